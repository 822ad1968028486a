"""What an engine is asked for beside plain greedy requests: page ends, sampling, aborts, speculation, sparse lists."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import COVERING, PAGE, SPARSE, core, counters, generate, leaked, outputs, start, tokens, wrong_records

pytestmark = pytest.mark.engine

BOUNDARY = [n + d for n in (32, 64, 256, 512) for d in (-1, 0, 1)] + [1, 2]
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
SAMPLING = {"temperature": 1.0, "seed": 7, "n": 4}


def boundary_prompts() -> list[list[int]]:
    """Lengths around page ends."""
    rnd = random.Random(0)
    return [tokens(rnd, n) for n in BOUNDARY]


def repetitive_prompts() -> list[list[int]]:
    """Prompts in which a lookup of the last tokens finds something; lengths on and around page ends."""
    rnd = random.Random(1)
    return [(tokens(rnd, 9) * 99)[:n] for n in (31, 32, 64, 95, 320, 500)]


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
            "repetitive": generate(llm, repetitive_prompts(), 100),
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


class Checker:
    """Compares every sparse decode step of an engine with the method's definition, worked out from the cached keys."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from vllm_ext.attention_backends.cpu_backend import SparseCPUImpl

        self.steps = self.several = self.partial = 0
        self.worst = 0.0
        original = SparseCPUImpl._sparse

        def checked(impl: Any, method: Any, query: Any, kv_cache: Any, meta: Any, output: Any) -> None:
            original(impl, method, query, kv_cache, meta, output)
            for r in meta.sparse_rows:
                self.compare(impl, method, query, kv_cache, meta, output, r)

        patch.setattr(SparseCPUImpl, "_sparse", checked)

    def compare(self, impl: Any, method: Any, query: Any, kv_cache: Any, meta: Any, output: Any, r: int) -> None:
        """One request of one layer."""
        from vllm_ext.attention_backends.cpu_backend import cache_views, layout_of

        rows, n = slice(meta.starts[r], meta.starts[r + 1]), meta.lens[r]
        pages = meta.block_table[r, : -(-n // PAGE)].long()
        keys, values = (x[pages].transpose(1, 2).flatten(0, 1)[:n] for x in cache_views(kv_cache, layout_of(kv_cache)))
        q = query.view(-1, impl.num_heads, impl.head_size)[rows]
        want, read = attention(method, q.double(), keys.double(), values.double(), impl.scale)
        got = output.view(-1, impl.num_heads, impl.head_size)[rows]
        self.worst = max(self.worst, (got - want).abs().max().item())
        self.steps += 1
        self.several += q.shape[0] > 1
        self.partial += read < n


def attention(
    method: Any, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, int]:
    """Sparse attention of m tokens by definition: q [m, Hq, D], keys and values [n, H, D]; and keys read by a head."""
    (m, hq, _), (n, heads, _) = q.shape, keys.shape
    g, count = hq // heads, -(-n // PAGE)
    hidden = torch.arange(n)[None] > torch.arange(n - m, n)[:, None]
    out, read = torch.zeros_like(q), 0
    for h in range(heads):
        mine = q[:, h * g : (h + 1) * g]
        logits = torch.einsum("tid,nd->tin", mine, keys[:, h]) * scale
        logits = logits.masked_fill(hidden[:, None], -math.inf)
        chosen = choose(method, [page_score(method, mine, keys[:, h], logits, p, scale) for p in range(count)], n, m)
        seen = [i for p in chosen for i in range(p * PAGE, min(n, (p + 1) * PAGE))]
        out[:, h * g : (h + 1) * g] = logits[..., seen].softmax(-1) @ values[seen, h]
        read = max(read, len(seen))
    return out, read


def page_score(method: Any, q: torch.Tensor, keys: torch.Tensor, logits: torch.Tensor, p: int, scale: float) -> float:
    """Score of page p for the rows q [m, g, D] of one KV head."""
    page = keys[p * PAGE : (p + 1) * PAGE]
    if method.score == "bound":
        return (torch.maximum(q * page.amin(0), q * page.amax(0)).sum(-1) * scale).max().item()
    if method.score == "exact":
        return logits.softmax(-1)[..., p * PAGE : (p + 1) * PAGE].sum().item()
    return float(p)


def choose(method: Any, scores: list[float], n: int, m: int) -> list[int]:
    """The pages a list holds: sinks, local pages, pages of the queries, then the best."""
    count = len(scores)
    forced = {p for p in range(count) if p < method.sink or p >= count - method.local or p >= (n - m) // PAGE}
    ranked = sorted(range(count), key=lambda p: (p not in forced, -scores[p], p))
    return sorted(ranked[: method.capacity])


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


def test_speculation_with_room_for_all_pages_is_stock(tiny_model, stock, monkeypatch) -> None:
    """Up to five query tokens a step, drafts rejected and overwritten, on page ends too."""
    checker = Checker(monkeypatch)
    with start(tiny_model, {"quest": COVERING}, speculative_config=NGRAM, disable_log_stats=False) as llm:
        assert generate(llm, repetitive_prompts(), 100) == stock["repetitive"]
        assert wrong_records(llm)[0] == []
        assert generate(llm, repetitive_prompts(), 100) == stock["repetitive"]
        assert leaked(llm) == 0
        metrics = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    drafted, accepted = (metrics[f"vllm:spec_decode_num_{x}_tokens"] for x in ("draft", "accepted"))
    assert 0 < accepted < drafted
    assert checker.several > 100
    assert checker.worst < 1e-4


def test_speculation_with_sparse_lists(tiny_model, monkeypatch) -> None:
    """One list serves the draft's tokens; each step is by definition what Quest reads for m queries."""
    checker = Checker(monkeypatch)
    with start(tiny_model, {"quest": SPARSE}, speculative_config=NGRAM) as llm:
        generate(llm, repetitive_prompts(), 60)
        assert wrong_records(llm)[0] == []
        assert leaked(llm) == 0
    assert checker.several > 50
    assert checker.partial > 50
    assert checker.worst < 1e-4
