"""2,000 random requests on a tiny model in a tiny pool, under Quest: no leak, no stale index record, no wrong token."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from engines import PAGE, core, counters, first_difference, generate, is_tie, leaked, start, tokens, wrong_records

pytestmark = pytest.mark.engine

REQUESTS = 2000
LONGEST = 1500
POOL = 64
"""Blocks of the pool: 63 pages of 32 tokens, a third more than the longest request."""
METHOD = {"page_size": PAGE, "budget": 2048, "dense_below": 0, "dense_layers": [1]}
ENGINE = {"max_model_len": 1600, "max_num_seqs": 24, "max_num_batched_tokens": 512}


@dataclass
class Request:
    """One request of the workload and what came of it."""

    prompt: list[int]
    max_tokens: int
    abort_after: int | None = None
    """Steps after which the client goes away."""
    got: list[int] = field(default_factory=list)
    finished: bool = False


def workload(seed: int) -> list[Request]:
    """Lengths 1 to LONGEST, a quarter with a shared prefix, a tenth repeated, a tenth aborted."""
    rnd = random.Random(seed)
    prefixes = [tokens(rnd, n) for n in (32, 64, 96, 150, 300, 640)]
    made: list[Request] = []
    for _ in range(REQUESTS):
        kind = rnd.random()
        if kind < 0.1 and made:
            prompt = rnd.choice(made).prompt
        elif kind < 0.35:
            prompt = rnd.choice(prefixes)
            prompt = prompt[: rnd.randint(1, len(prompt))] + tokens(rnd, rnd.choice((0, 1, 31, 32, 33, 100)))
        elif kind < 0.95:
            prompt = tokens(rnd, round(2 ** rnd.uniform(0, 8)))
        else:
            prompt = tokens(rnd, rnd.randint(257, LONGEST))
        out = rnd.randint(1, 8) if rnd.random() < 0.75 else rnd.randint(9, 100)
        abort = rnd.randint(0, 20) if rnd.random() < 0.1 else None
        made.append(Request(prompt, out, abort))
    made[-1].prompt, made[-2].prompt = tokens(rnd, LONGEST), tokens(rnd, 1)
    return made


class Driver:
    """Feeds an engine in bursts, aborts some requests, collects tokens as they come."""

    def __init__(self, llm: Any, requests: list[Request], seed: int) -> None:
        self.engine, self.requests, self.rnd = llm.llm_engine, requests, random.Random(seed)
        self.preemptions = 0
        self.alive: dict[str, int] = {}
        scheduler, original = core(llm).scheduler, core(llm).scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.preemptions += 1
            return original(*args, **kwargs)

        scheduler._preempt_request = counted

    def run(self, each: Any) -> int:
        """All requests to their end; calls `each(step)` after every step and returns how many there were."""
        waiting, step = list(range(len(self.requests))), 0
        while waiting or self.alive:
            while waiting and len(self.alive) < 30 and self.rnd.random() < 0.9:
                self._add(waiting.pop(0), step)
            if not self.alive:
                continue
            self._abort(step)
            for output in self.engine.step():
                self._take(output)
            step += 1
            each(step)
        return step

    def _add(self, number: int, step: int) -> None:
        from vllm import SamplingParams

        request = self.requests[number]
        sampling = SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True, detokenize=False)
        self.engine.add_request(str(number), {"prompt_token_ids": request.prompt}, sampling)
        self.alive[str(number)] = step

    def _abort(self, step: int) -> None:
        gone = [
            name
            for name, since in self.alive.items()
            if (after := self.requests[int(name)].abort_after) is not None and step - since >= after
        ]
        if gone:
            self.engine.abort_request(gone)
            for name in gone:
                del self.alive[name]

    def _take(self, output: Any) -> None:
        request = self.requests[int(output.request_id)]
        request.got = list(output.outputs[0].token_ids)
        if output.finished:
            request.finished = True
            self.alive.pop(output.request_id, None)


@pytest.fixture(scope="module")
def run(tiny_model: Path) -> dict[str, Any]:
    """The workload under Quest, with the index compared on the way."""
    requests = workload(0)
    wrong: list[str] = []
    pages = []
    with start(tiny_model, {"quest": METHOD}, **ENGINE, num_gpu_blocks_override=POOL) as llm:

        def check(step: int) -> None:
            if step % 50 == 0:
                found, count = wrong_records(llm)
                wrong.extend(f"step {step}: {w}" for w in found)
                pages.append(count)

        driver = Driver(llm, requests, seed=1)
        steps = driver.run(check)
        found, count = wrong_records(llm)
        return {
            "requests": requests,
            "steps": steps,
            "preemptions": driver.preemptions,
            "wrong": wrong + found,
            "pages": [*pages, count],
            "leaked": leaked(llm),
            "stats": counters(llm),
            "unfinished": core(llm).scheduler.get_num_unfinished_requests(),
        }


def test_the_workload_is_what_it_claims(run: dict[str, Any]) -> None:
    lengths = [len(r.prompt) for r in run["requests"]]
    assert len(lengths) == REQUESTS
    assert (min(lengths), max(lengths)) == (1, LONGEST)
    assert run["preemptions"] > 20
    done = sum(r.finished for r in run["requests"])
    assert done > 0.85 * REQUESTS
    assert sum(not r.finished and bool(r.got) for r in run["requests"]) > 20  # aborted in flight
    assert run["stats"]["sparse_steps"] > 5000
    assert run["stats"]["dense_steps"] == 0
    assert run["stats"]["keys_read"] == run["stats"]["keys_visible"]


def test_no_leak(run: dict[str, Any]) -> None:
    assert run["unfinished"] == 0
    assert run["leaked"] == 0


def test_index_equals_the_index_rebuilt_from_the_keys(run: dict[str, Any]) -> None:
    assert not run["wrong"]
    assert min(run["pages"]) > 10
    assert len(run["pages"]) > 10


def test_no_wrong_token(run: dict[str, Any], tiny_model: Path) -> None:
    """Aborted requests count as well, as far as they got; ties in the dense run are allowed and counted."""
    longest: dict[tuple[int, ...], int] = defaultdict(int)
    for r in run["requests"]:
        longest[tuple(r.prompt)] = max(longest[tuple(r.prompt)], len(r.got))
    asked = {p: n for p, n in longest.items() if n}
    ties, wrong = 0, []
    with start(tiny_model, None, **ENGINE | {"max_num_seqs": 64}, num_gpu_blocks_override=1000) as dense:
        want = dict(zip(asked, generate(dense, [list(p) for p in asked], list(asked.values()))))
        for i, r in enumerate(run["requests"]):
            if r.finished:
                assert len(r.got) == r.max_tokens
            if not r.got or first_difference(want[tuple(r.prompt)], r.got) is None:
                continue
            if is_tie(dense, r.prompt, want[tuple(r.prompt)], r.got):
                ties += 1
            else:
                wrong.append(f"request {i}: {r.got}, dense {want[tuple(r.prompt)]}")
    print(f"{ties} ties in {sum(len(r.got) for r in run['requests'])} tokens, {run['preemptions']} preemptions")
    assert not wrong
    assert ties <= 5
