"""Kernels of the eviction engine against their references: odd lengths, shuffled pages, ties, poisoned outputs."""

from __future__ import annotations

import pytest
import torch
from paged import DEVICE

from vllm_ext.kernels import kv_reference as reference
from vllm_ext.kernels.kv_compact import LayerCaches
from vllm_ext.kernels.kv_redundancy import redundancy
from vllm_ext.kernels.kv_window_score import WindowScore

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
    """Two layers of two requests that begin at slot `first`: queries, caches, block tables, attention [4, Hq, w, n]."""
    n, w, heads, g, block, d = case
    w = min(w, n)
    one, row = cache_of(n, first, heads, d, block)
    caches = [one, torch.randn(one.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)]
    rows = torch.stack([row, row.roll(1)])[:, first // block :]
    queries = torch.randn(4, w, heads * g, d, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    keys = torch.stack([reference.resident(c[..., :d], r, 0, n) for r in rows for c in caches])
    attention = reference.window_attention(queries, keys, d**-0.5)
    return queries, LayerCaches([c[..., :d] for c in caches]), rows, attention


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("first", [64])
def test_window_sum_is_the_reference(case: tuple[int, ...], first: int) -> None:
    queries, keys, rows, attention = window_case(case, first)
    found = WindowScore(queries, keys, rows, case[0], case[5] ** -0.5)
    torch.testing.assert_close(found.heads_sum(), reference.weighted_rows(attention), rtol=1e-4, atol=1e-6)
    weights = torch.linspace(0.1, 1, queries.shape[1], device=DEVICE)
    want = reference.weighted_rows(attention, weights)
    torch.testing.assert_close(found.heads_sum(weights), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.mean(weights), reference.group_mean(want, case[2]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("pool", [1, 5])
def test_worst_case_is_the_reference(case: tuple[int, ...], pool: int) -> None:
    queries, keys, rows, attention = window_case(case)
    found = WindowScore(queries, keys, rows, case[0], case[5] ** -0.5)
    for columns in {case[0], max(1, case[0] - queries.shape[1]), 2}:
        want = reference.worst_case(attention, case[2], pool, columns)
        torch.testing.assert_close(found.worst(pool, columns), want, rtol=2e-4, atol=1e-6)


def test_one_layer_of_several_is_scored() -> None:
    queries, keys, rows, attention = window_case(CASES[1])
    found = WindowScore(queries[1::2], keys, rows, CASES[1][0], CASES[1][5] ** -0.5, range(1, 2))
    torch.testing.assert_close(found.worst(5), reference.worst_case(attention, 3, 5)[1::2], rtol=2e-4, atol=1e-6)


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


@pytest.mark.parametrize("case", [(70, 40, 1, 16, 64), (300, 96, 3, 32, 80), (330, 256, 2, 32, 128)], ids=str)
@pytest.mark.parametrize("start", [0, 32])
def test_compaction_moves_exact_bytes(case: tuple[int, ...], start: int) -> None:
    """Survivors of two requests in two layers arrive bit for bit, and nothing outside the target slots changes."""
    n, count, heads, block, d = case
    one, row = cache_of(2 * (start + n) + block, 0, heads, d, block)
    before = [one, one.flip(0).contiguous()]
    half = -(-(start + n) // block)
    rows = torch.stack([row[:half], row[half : 2 * half]])[:, start // block :]
    boundary = n // block * block
    gen = torch.Generator().manual_seed(3)
    picks = [torch.randperm(boundary, generator=gen)[:count].sort().values for _ in range(4 * heads)]
    kept = torch.stack(picks).view(2, 2, heads, count).to(DEVICE)
    found, want = [x.clone() for x in before], [x.clone() for x in before]
    caches = LayerCaches(found)
    resident = torch.stack([reference.resident(c, r, 0, n) for r in rows for c in before])
    assert torch.equal(caches.gather(rows, 0, n), resident)
    assert torch.equal(caches.gather(rows, 3, n - 1, range(1, 2)), resident[1::2, :, 3 : n - 1])
    for r in range(2):
        for layer in range(2):
            reference.compact(want[layer], rows[r], kept[r, layer], 0, boundary - count)
    caches.compact(rows, kept, boundary - count)
    assert all(map(torch.equal, found, want))
    after = caches.gather(rows, boundary - count, boundary)
    assert torch.equal(after, resident.gather(2, kept.flatten(0, 1)[..., None].expand(-1, -1, -1, 2 * d)))
    for cache, old in zip(found, before):
        cache.copy_(old)
    same = kept[:, :, :1].expand(-1, -1, heads, -1)  # one set for all heads
    caches.compact(rows, same, boundary - count)
    after = caches.gather(rows, boundary - count, boundary)
    assert torch.equal(after, resident.gather(2, same.flatten(0, 1)[..., None].expand(-1, -1, -1, 2 * d)))


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


def test_window_queries() -> None:
    from vllm_ext.kernels.kv_tables import window_queries

    rings = [torch.randn(3, 4, 3, 20, device=DEVICE) for _ in range(2)]
    places = torch.tensor([[6, 7, 4], [2, 3, 0]], dtype=torch.int32, device=DEVICE)
    pointers = torch.tensor([r.data_ptr() for r in rings], device=DEVICE)
    want = torch.stack([r.flatten(0, 1)[p.long()] for p in places for r in rings])
    assert torch.equal(window_queries(pointers, rings[0], places), want)


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
@pytest.mark.parametrize(("n", "d", "threshold"), [(30, 64, 0.5), (300, 80, 0.5), (201, 32, -0.2), (260, 16, 0.9)])
def test_redundancy_is_the_reference(n: int, d: int, threshold: float, recent: int) -> None:
    caches = [cache_of(2 * n + 64, 0, 2, d, 32, seed)[0] for seed in range(2)]
    row = cache_of(2 * n + 64, 0, 2, d, 32)[1]
    rows = torch.stack([row[: len(row) // 2], row[len(row) // 2 : len(row) // 2 * 2]])
    slots = torch.arange(n // 2, n, device=DEVICE)
    for cache in caches:  # the second half repeats the first up to noise; one key is zero
        for row in rows:
            old = reference.resident(cache, row, 0, n - n // 2)
            cache[row[slots // 32].long(), :, slots % 32] += 1.5 * old.transpose(0, 1)
            cache[row[0].long(), 0, 5] = 0
    keys = [cache[..., :d] for cache in caches]
    plain = torch.stack([reference.resident(k, row, 0, n) for row in rows for k in keys])
    want = reference.redundancy(plain, threshold, recent, entries=100_000)
    found = redundancy(LayerCaches(keys), rows, n, threshold, recent)
    torch.testing.assert_close(found * n, want * n, rtol=1e-5, atol=1e-6)
    for count in (n // 4, n // 2):
        pick = [reference.choose(-x, count, n, 0, n) for x in (found, want)]
        assert torch.equal(*pick)


def test_redundancy_by_definition() -> None:
    """Two tokens with the same key: the newer one's copy counts, the older one's newest copy does not."""
    keys = torch.eye(4)[None, None].clone()
    keys[0, 0, 2] = keys[0, 0, 0]
    mean = torch.tensor([0.0, 0.0, 0.0, 0.0])  # tokens 0 and 2 are each other's newest near-duplicate
    torch.testing.assert_close(reference.redundancy(keys, 0.5, 1)[0, 0], mean.softmax(-1))
    mean = torch.tensor([1.0, 0.0, 1.0, 0.0]) / 4
    torch.testing.assert_close(reference.redundancy(keys, 0.5, 0)[0, 0], mean.softmax(-1))
