"""What an engine is asked for beside plain greedy requests: page ends, sampling, aborts, speculation, sparse lists."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from definition import Checker
from engines import (
    COVERING,
    SPARSE,
    core,
    counters,
    generate,
    leaked,
    outputs,
    start,
    tokens,
    wrong_records,
)
from forked import call
from speculation import OUTPUT, repetitive_prompts

pytestmark = pytest.mark.engine

BOUNDARY = [n + d for n in (32, 64, 256, 512) for d in (-1, 0, 1)] + [1, 2]
SPECULATION = Path(__file__).with_name("speculation.py")
SAMPLING = {"temperature": 1.0, "seed": 7, "n": 4}


def boundary_prompts() -> list[list[int]]:
    """Lengths around page ends."""
    rnd = random.Random(0)
    return [tokens(rnd, n) for n in BOUNDARY]


def samples(llm: Any) -> list[list[int]]:
    """Four seeded samples of one prompt."""
    [out] = outputs(llm, [boundary_prompts()[7]], 40, **SAMPLING)
    return [list(o.token_ids) for o in sorted(out.outputs, key=lambda o: o.index)]


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> dict[str, Any]:
    """What stock vLLM answers."""
    with start(tiny_model) as llm:
        return {
            "boundary": generate(llm, boundary_prompts(), 40),
            "samples": samples(llm),
            "repetitive": generate(llm, repetitive_prompts(), OUTPUT),
        }


@pytest.fixture(scope="module")
def covering(tiny_model: Path) -> Iterator[Any]:
    """One engine under Quest for the tests of this file that can share it."""
    with start(tiny_model, {"quest": COVERING}) as llm:
        yield llm


def test_prompts_that_end_on_a_page(stock, covering) -> None:
    before = counters(covering)["sparse_steps"]
    assert generate(covering, boundary_prompts(), 40) == stock["boundary"]
    assert counters(covering)["sparse_steps"] - before == len(BOUNDARY) * 39
    assert generate(covering, boundary_prompts(), 40) == stock["boundary"]
    assert wrong_records(covering)[0] == []


def test_one_token_needs_no_decode_step(stock, covering) -> None:
    before = counters(covering)
    assert generate(covering, boundary_prompts(), 1) == [t[:1] for t in stock["boundary"]]
    assert counters(covering) == before
    assert leaked(covering) == 0


def test_seeded_samples_are_those_of_stock(stock, covering) -> None:
    found = samples(covering)
    assert found == stock["samples"]
    assert len({tuple(s) for s in found}) == 4
    assert leaked(covering) == 0


def test_abort_in_flight(stock, covering) -> None:
    """Half of a batch is aborted, in prefill and in decode; the others do not notice."""
    from vllm import SamplingParams

    engine, prompts = covering.llm_engine, boundary_prompts()
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, detokenize=False)
        engine.add_request(f"abort-{i}", {"prompt_token_ids": prompt}, sampling)
    got: dict[str, list[int]] = {}
    step = 0
    while engine.has_unfinished_requests():
        for out in engine.step():
            got[out.request_id] = list(out.outputs[0].token_ids)
        step += 1
        if step in (2, 15):
            engine.abort_request([f"abort-{i}" for i in range(len(prompts)) if i % 4 == (1 if step == 2 else 3)])
    for i, want in enumerate(stock["boundary"]):
        tail = got.get(f"abort-{i}", [])
        assert tail == (want if i % 2 == 0 else want[: len(tail)])
        assert i % 2 == 0 or len(tail) < 40
    assert leaked(covering) == 0
    assert core(covering).scheduler.get_num_unfinished_requests() == 0


@pytest.mark.parametrize("name", ["quest", "oracle_topk", "streaming"])
def test_sparse_steps_follow_the_definition(tiny_model, stock, monkeypatch, name: str) -> None:
    checker = Checker(monkeypatch)
    with start(tiny_model, {name: SPARSE}) as llm:
        first = generate(llm, boundary_prompts(), 40)
        assert generate(llm, boundary_prompts(), 40) == first  # all prefix hits
        stats = counters(llm)
    assert checker.steps == 2 * 2 * len(BOUNDARY) * 39  # two sparse layers, two rounds
    assert checker.partial > checker.steps / 3
    assert checker.worst < 1e-4
    assert 0.2 < stats["keys_read"] / stats["keys_visible"] < 0.6
    assert [t[0] for t in first] == [t[0] for t in stock["boundary"]]


@pytest.mark.parametrize("name", ["quest", "retro"])
def test_speculation_with_room_for_all_pages_is_stock(tiny_model, stock, name: str) -> None:
    """Up to five query tokens a step, drafts rejected and overwritten, on page ends too."""
    run = call("v1", SPECULATION, "run", str(tiny_model), COVERING, name)
    assert run["first"] == run["again"] == stock["repetitive"]
    assert run["wrong_records"] == []
    assert run["leaked"] == 0
    assert 0 < run["accepted"] < run["drafted"]
    assert run["several"] > 100
    assert run["worst"] < 1e-4


@pytest.mark.parametrize("name", ["quest", "retro"])
def test_speculation_with_sparse_lists(tiny_model, name: str) -> None:
    """One list serves the tokens of a draft; each step reads what the method defines for m queries."""
    run = call("v1", SPECULATION, "run", str(tiny_model), SPARSE, name)
    assert run["wrong_records"] == []
    assert run["leaked"] == 0
    assert run["several"] > 50
    assert run["partial"] > 50
    assert run["worst"] < 1e-4
