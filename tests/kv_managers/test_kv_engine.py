"""Eviction in real CPU engines: stock tokens where nothing is evicted, exact attention over the rest, freed blocks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from kv_engines import SMALL, Checker, compactor, generate, leaked, manager, outputs, pool, start, tokens

pytestmark = pytest.mark.engine

LENGTHS = (40, 300, 65, 500, 129, 31)
OUTPUT = 40
EVICTING = {
    "snapkv": SMALL,
    "r_kv": {"budget": 64, "stride": 32},
    "streaming_llm": SMALL | {"stride": 32},
}
CHUNKS = {"max_num_batched_tokens": 128}


def prompts() -> list[list[int]]:
    rnd = random.Random(0)
    return [tokens(rnd, n) for n in LENGTHS]


def answers(llm: Any) -> list[Any]:
    """Tokens and the log-probabilities of the likeliest ones at every position."""
    found = [o.outputs[0] for o in outputs(llm, prompts(), OUTPUT, logprobs=3)]
    return [(list(x.token_ids), [{t: v.logprob for t, v in at.items()} for at in x.logprobs]) for x in found]


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> list[Any]:
    with start(tiny_model, **CHUNKS) as llm:
        return answers(llm)


@pytest.mark.parametrize("plugin", [{"snapkv": {"ratio": 1.0}}, {"r_kv": {}}, {"streaming_llm": {}}], ids=str)
def test_room_for_everything_is_stock(tiny_model: Path, stock: list[Any], plugin: dict[str, Any]) -> None:
    """Equal tokens, and logits equal to the bit."""
    with start(tiny_model, plugin, **CHUNKS) as llm:
        assert answers(llm) == stock
        assert compactor(llm).totals.compactions == 0


@pytest.mark.parametrize("name", EVICTING)
def test_attention_reads_what_was_kept(tiny_model: Path, name: str) -> None:
    """Every step of every layer; then the same prompts again: equal tokens, prefix hits, no block lost."""
    from vllm_ext.config import expand

    method = type(expand([name]).plugins[name])
    with pytest.MonkeyPatch.context() as patch, start(tiny_model, {name: EVICTING[name]}, **CHUNKS) as llm:
        checker = Checker(patch, method)
        first = generate(llm, prompts(), OUTPUT)
        assert checker.worst < 5e-5  # fp32 against fp64, sums of up to 540 keys
        assert checker.compressed > 300
        assert leaked(llm) == 0
        assert manager(llm).blocks_freed > 20
        again = outputs(llm, prompts(), OUTPUT)
        hits = [o.num_cached_tokens for o in again]
        if method.trigger != "streaming":  # streaming evicts inside the prompt, where it is cut into chunks
            assert [list(o.outputs[0].token_ids) for o in again] == first
            # the slots of the survivors take no hits; 40 and 65 tokens lose nothing, so all their whole blocks hit
            assert hits == [32, 224, 64, 416, 64, 0] if name == "snapkv" else sum(hits) > 600
        assert leaked(llm) == 0


def test_chunks_do_not_change_what_is_kept(tiny_model: Path) -> None:
    """One-shot methods see the whole prompt and its last queries, however it was cut."""
    found = []
    for size in (48, 1024):
        with start(tiny_model, {"snapkv": SMALL}, max_num_batched_tokens=size, max_num_seqs=8) as llm:
            found.append(generate(llm, prompts(), OUTPUT))
    assert found[0] == found[1]


def test_a_shared_prefix_is_never_written(tiny_model: Path) -> None:
    """One request is compressed while another reads the same blocks: it answers as alone, and no byte changes."""
    rnd = random.Random(3)
    long = tokens(rnd, 600)
    short = [*long[:320], *tokens(rnd, 20)]
    options = {"snapkv": {"ratio": 0.4, "window": 16}}
    with start(tiny_model, options) as llm:
        alone = generate(llm, [short], OUTPUT)
    with start(tiny_model, options) as llm:
        generate(llm, [long], 1)
        published = [b.block_id for b in pool(llm).blocks if b.block_hash is not None]
        caches = [layer.cache for layer in compactor(llm).layers]
        before = [cache[published].clone() for cache in caches]
        out = outputs(llm, [long, short, long], OUTPUT)
        assert [list(o.outputs[0].token_ids) for o in out][1] == alone[0]
        assert out[0].outputs[0].token_ids == out[2].outputs[0].token_ids
        assert out[1].num_cached_tokens >= 160
        assert all((cache[published] == old).all() for cache, old in zip(caches, before))
        assert len(published) >= 10


def test_more_requests_run_at_once(tiny_model: Path) -> None:
    """A pool for three dense requests holds at least twice as many compressed ones, and preempts less."""
    rnd = random.Random(4)
    many = [tokens(rnd, 200) for _ in range(8)]
    peaks, preempted = [], []
    for plugin in (None, {"r_kv": {"budget": 64, "stride": 32}}):
        with start(tiny_model, plugin, num_gpu_blocks_override=48, max_num_batched_tokens=256) as llm:
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            peak, count, plan, preempt = [0], [0], scheduler.schedule, scheduler._preempt_request

            def schedule(*a: Any, plan: Any = plan, peak: Any = peak, scheduler: Any = scheduler, **k: Any) -> Any:
                found = plan(*a, **k)
                peak[0] = max(peak[0], len(scheduler.running))
                return found

            def preempting(*a: Any, preempt: Any = preempt, count: Any = count, **k: Any) -> Any:
                count[0] += 1
                return preempt(*a, **k)

            scheduler.schedule, scheduler._preempt_request = schedule, preempting
            done = generate(llm, many, 300)
            assert all(len(t) == 300 for t in done)
            assert leaked(llm) == 0
            peaks.append(peak[0])
            preempted.append(count[0])
    assert peaks[1] >= 2 * min(peaks[0], 3)
    assert preempted[1] < preempted[0]


def test_preempted_requests_are_compressed_again(tiny_model: Path) -> None:
    rnd = random.Random(5)
    many = [tokens(rnd, n) for n in (200, 300, 250, 350, 150)]
    from vllm_ext.kv_managers.snapkv import SnapKV

    with (
        pytest.MonkeyPatch.context() as patch,
        start(tiny_model, {"snapkv": SMALL}, num_gpu_blocks_override=36, **CHUNKS) as llm,
    ):
        checker = Checker(patch, SnapKV)
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        count, preempt = [0], scheduler._preempt_request

        def preempting(*a: Any, **k: Any) -> Any:
            count[0] += 1
            return preempt(*a, **k)

        scheduler._preempt_request = preempting
        done = generate(llm, many, 400)
        assert [len(t) for t in done] == [400] * 5
        assert count[0] > 0
        assert checker.worst < 1e-5
        assert leaked(llm) == 0
