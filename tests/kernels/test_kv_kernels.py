"""Kernels of the eviction engine against their references: odd lengths, shuffled pages, ties, poisoned outputs."""

from __future__ import annotations

import pytest
import torch
from paged import DEVICE

from vllm_ext.kernels import kv_reference as reference

CASES = [(5, 3, 1, 2, 16, 64), (70, 8, 3, 2, 32, 64), (257, 32, 2, 4, 32, 80), (129, 5, 1, 7, 16, 128)]
"""Resident tokens, window, KV heads, query heads a KV head, block, head size."""


def cache_of(n: int, first: int, heads: int, d: int, block: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache [num_blocks, H, P, 2D] of garbage, and the block table of a request with `first + n` slots."""
    gen = torch.Generator().manual_seed(seed)
    blocks = -(-(first + n) // block)
    cache = torch.randn(blocks + 5, heads, block, 2 * d, generator=gen).to(DEVICE)
    row = (torch.randperm(blocks + 4, generator=gen) + 1)[:blocks].int().to(DEVICE)
    return cache, row


def window_case(case: tuple[int, ...], first: int = 0):
    n, w, heads, g, block, d = case
    w = min(w, n)
    cache, row = cache_of(n, first, heads, d, block)
    queries = torch.randn(w, heads * g, d, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    keys = reference.resident(cache[..., :d], row, first, first + n)
    attention = reference.window_attention(queries[None], keys[None], d**-0.5)
    return queries, cache[..., :d], row, attention


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("first", [64])
def test_window_sum_is_the_reference(case: tuple[int, ...], first: int) -> None:
    from vllm_ext.kernels.kv_window_score import WindowScore

    queries, keys, row, attention = window_case(case, first)
    found = WindowScore(queries, keys, row, first, case[0], case[5] ** -0.5)
    torch.testing.assert_close(found.heads_sum(), reference.weighted_rows(attention)[0], rtol=1e-4, atol=1e-6)
    weights = torch.linspace(0.1, 1, queries.shape[0], device=DEVICE)
    want = reference.weighted_rows(attention, weights)[0]
    torch.testing.assert_close(found.heads_sum(weights), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("pool", [1, 5])
def test_worst_case_is_the_reference(case: tuple[int, ...], pool: int) -> None:
    from vllm_ext.kernels.kv_window_score import WindowScore

    queries, keys, row, attention = window_case(case)
    found = WindowScore(queries, keys, row, 0, case[0], case[5] ** -0.5)
    for columns in (case[0], max(1, case[0] - queries.shape[0])):
        want = reference.worst_case(attention, case[2], pool, columns)[0]
        torch.testing.assert_close(found.worst(pool, columns), want, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "chosen", "count", "sinks", "window"),
    [(40, 40, 16, 0, 1), (100, 96, 32, 4, 8), (64, 64, 64, 4, 8), (2100, 2080, 64, 0, 40)],
)
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_survivors_are_the_reference(n: int, chosen: int, count: int, sinks: int, window: int, kind: str) -> None:
    from vllm_ext.kernels.kv_select import choose

    scores = torch.randn(1, 2, n, generator=torch.Generator().manual_seed(n)).to(DEVICE)
    scores = scores if kind == "random" else (scores > 0).float() - 1
    want = reference.choose(scores, count, chosen, sinks, n - window)
    found = choose(scores, count, chosen, sinks, n - window)
    assert torch.equal(found, want)
    assert want.unique(dim=-1).shape[-1] == count
    assert set(range(sinks)) <= set(want[0, 0].tolist())


@pytest.mark.parametrize("case", [(70, 40, 1, 16, 64), (300, 96, 3, 32, 80), (130, 128, 2, 32, 128)], ids=str)
@pytest.mark.parametrize("start", [0, 32])
def test_compaction_moves_exact_bytes(case: tuple[int, ...], start: int) -> None:
    """Survivors arrive bit for bit, and nothing outside the target slots changes."""
    from vllm_ext.kernels.kv_compact import LayerCaches

    n, count, heads, block, d = case
    cache, row = cache_of(n, start, heads, d, block)
    boundary = (start + n) // block * block
    gen = torch.Generator().manual_seed(3)
    picks = [torch.randperm(boundary - start, generator=gen)[:count].sort().values for _ in range(heads)]
    kept, want = torch.stack(picks).to(DEVICE), cache.clone()
    before = reference.resident(cache, row, start, start + n)
    reference.compact(want, row, kept, start, boundary - count)
    second, other = cache.clone(), kept.flip(0).contiguous()
    caches = LayerCaches([cache, second])
    assert torch.equal(caches.gather(row, start, start + n)[1], before)
    caches.compact(row, torch.stack([kept, other]), start, boundary - count)
    assert torch.equal(cache, want)
    moved = reference.resident(second, row, boundary - count, boundary)
    assert torch.equal(moved, before.gather(1, other[..., None].expand(-1, -1, 2 * d)))
    after = reference.resident(cache, row, boundary - count, boundary)
    assert torch.equal(after, before.gather(1, kept[..., None].expand(-1, -1, 2 * d)))


def test_shifted_tables() -> None:
    from vllm_ext.kernels.kv_tables import shift_tables

    table = torch.arange(1, 121, dtype=torch.int32, device=DEVICE).view(4, 30)
    starts = torch.tensor([0, 64, 896, 0], dtype=torch.int32, device=DEVICE)
    lens = torch.tensor([100, 70, 960, 0], dtype=torch.int32, device=DEVICE)
    out, out_lens = torch.full_like(table, -7), torch.full_like(lens, -7)
    shift_tables(table, starts, lens, out, out_lens, 32)
    assert out_lens.tolist() == [100, 6, 64, 0]
    assert out[0, :4].tolist() == table[0, :4].tolist()
    assert out[1, :1].tolist() == table[1, 2:3].tolist()
    assert out[2, :2].tolist() == table[2, 28:30].tolist()
    assert (out[3] == -7).all()


def test_recorded_queries() -> None:
    from vllm_ext.kernels.kv_tables import record_queries

    query = torch.randn(6, 3, 20, device=DEVICE)
    ring = torch.zeros(2, 4, 3, 20, device=DEVICE)
    places = torch.tensor([-1, 5, -1, 0, 7, -1], dtype=torch.int32, device=DEVICE)
    record_queries(query, places, ring)
    flat = ring.flatten(0, 1)
    assert torch.equal(flat[5], query[1])
    assert torch.equal(flat[0], query[3])
    assert torch.equal(flat[7], query[4])
    assert flat[[1, 2, 3, 4, 6]].eq(0).all()


@pytest.mark.parametrize("recent", [0, 1])
@pytest.mark.parametrize(("n", "d"), [(30, 64), (130, 80)])
def test_redundancy_is_the_reference(n: int, d: int, recent: int) -> None:
    from vllm_ext.kernels.kv_redundancy import redundancy

    keys = torch.randn(2, 2, n, d, generator=torch.Generator().manual_seed(n)).to(DEVICE)
    keys[..., n // 2 :, :] += keys[..., : n - n // 2, :]  # near-duplicates
    want = reference.redundancy(keys, 0.5, recent, entries=1000)
    torch.testing.assert_close(redundancy(keys, 0.5, recent), want, rtol=1e-4, atol=1e-6)


def test_redundancy_by_definition() -> None:
    """Two tokens with the same key: the newer one's copy counts, the older one's newest copy does not."""
    keys = torch.eye(4)[None, None].clone()
    keys[0, 0, 2] = keys[0, 0, 0]
    mean = torch.tensor([0.0, 0.0, 0.0, 0.0])  # tokens 0 and 2 are each other's newest near-duplicate
    torch.testing.assert_close(reference.redundancy(keys, 0.5, 1)[0, 0], mean.softmax(-1))
    mean = torch.tensor([1.0, 0.0, 1.0, 0.0]) / 4
    torch.testing.assert_close(reference.redundancy(keys, 0.5, 0)[0, 0], mean.softmax(-1))
