"""LycheeDecode and the static head split: the step by definition, kernel against reference, equal shares of work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from learned import roles
from paged import DEVICE, Paged, make

from vllm_ext.attention_backends.lychee import Lychee
from vllm_ext.attention_backends.stages import DecodeBatch, StageDims
from vllm_ext.kernels import reference, reference_lychee
from vllm_ext.kernels.mixed_decode import MixedBuffers


def batch_of(p: Paged, most: int) -> DecodeBatch:
    flags = torch.zeros(len(p.lens), dtype=torch.int32, device=DEVICE)
    return DecodeBatch(p.block_table, p.seq_lens, p.query_start_loc, p.slot_mapping, flags, p.q.shape[0], most)


def test_step_by_definition() -> None:
    """One request of ten pages: head 0 reads all and chooses, head 1 reads what it was given."""
    p = make([157], [1], 2, 2, 64, 16)
    pages = p.block_table[0, :10].long()
    given = torch.tensor([[0, 3, 7, 9], [1, 4, 6, 9]], dtype=torch.int32, device=DEVICE)
    out, after = reference_lychee.step(
        p.q, p.k_cache, p.v_cache, pages, 157, p.scale, [True, False], given, 4, 1, 1
    )  # fmt: skip
    keys = p.k_cache[pages].transpose(1, 2).flatten(0, 1)[:157].double()
    values = p.v_cache[pages].transpose(1, 2).flatten(0, 1)[:157].double()
    for h, seen in ((0, range(157)), (1, [i for b in (1, 4, 6, 9) for i in range(b * 16, min(157, b * 16 + 16))])):
        rows = p.q[0, 2 * h : 2 * h + 2].double()
        want = (rows @ keys[list(seen), h].T * p.scale).softmax(-1) @ values[list(seen), h]
        torch.testing.assert_close(out[0, 2 * h : 2 * h + 2].double(), want, atol=1e-5, rtol=1e-5)
    logits = p.q[0, :2].double().mean(0) @ keys[:, 0].T
    best = sorted(range(1, 9), key=lambda b: -logits[b * 16 : b * 16 + 16].max().item())[:2]
    assert after.tolist() == [sorted([0, 9, *best]), given[1].tolist()]


def test_first_and_last_pages() -> None:
    assert reference_lychee.recent_pages(10, 4, 1).tolist() == [0, 7, 8, 9]
    assert reference_lychee.recent_pages(10, 5, 3).tolist() == [0, 1, 2, 8, 9]
    assert reference_lychee.recent_pages(4, 5, 3).tolist() == [0, 1, 2, 3]
    assert reference_lychee.recent_pages(10, 4, 0).tolist() == [6, 7, 8, 9]


def layers_of(
    heads: int,
    g: int,
    d: int,
    page: int,
    lens: list[int],
    queries: list[int],
    every: int,
    kernels: bool,
    programs: int = 8,
    **options: Any,
) -> tuple[list[torch.Tensor], list[int], list[torch.Tensor]]:
    """Outputs of four layers, counters, and dense attention, by kernels or the reference."""
    most = max(queries)
    method = Lychee(page_size=page, sink=1, local=2, roles=roles(4, heads, g, d, every), **options)
    dims = StageDims(heads * g, heads, d, len(lens) + 1, 40 * page, most, DEVICE, torch.float32, (0, 1, 2, 3))
    stages = method.stages(dims)
    if kernels:
        stages.allocate()
        most_pairs, lists = (len(lens) + 1, heads), method.capacity
        stages.buffers = MixedBuffers.allocate(*most_pairs, dims.rows, d, 40, lists, stages.stats, programs)
    outs, dense = [], []
    for layer in range(4):
        p = make(lens, queries, heads, g, d, page, seed=layer)
        first = make(lens, queries, heads, g, d, page)
        p.block_table, p.slot_mapping = first.block_table, first.slot_mapping
        out = torch.full_like(p.q, float("nan"))
        step = stages.decode if kernels else stages.reference_decode
        step(layer, p.q, p.k_cache, p.v_cache, None, batch_of(p, most), out, p.scale)
        outs.append(out)
        exact = torch.empty_like(p.q)
        for r, n in enumerate(lens):
            rows = slice(p.starts[r], p.starts[r + 1])
            table = p.block_table[r, : -(-n // page)].long()
            exact[rows] = reference.sparse_attention(p.q[rows], p.k_cache, p.v_cache, table, None, n, p.scale)[0]
        dense.append(exact)
    return outs, stages.stats.tolist(), dense


@pytest.mark.parametrize(
    ("heads", "g", "d", "lens", "queries", "others"),
    [
        (2, 3, 64, [230, 35, 400], [1, 1, 1], "carried"),
        (3, 1, 80, [330, 40, 129], [3, 1, 2], "carried"),
        (3, 1, 80, [330, 40, 129], [3, 1, 2], "recent"),
        (1, 4, 128, [160], [4], "carried"),
    ],
)
def test_kernel_equals_reference(heads: int, g: int, d: int, lens: list[int], queries: list[int], others: str) -> None:
    options = {"budget": 96, "dense_below": 50, "others": others}
    got, stats, dense = layers_of(heads, g, d, 16, lens, queries, 3, True, **options)
    want, expected, _ = layers_of(heads, g, d, 16, lens, queries, 3, False, **options)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)
    assert stats == expected
    torch.testing.assert_close(got[0], dense[0], atol=2e-4, rtol=2e-4)  # the first layer reads everything
    assert max((a - b).abs().max().item() for a, b in zip(got[1:], dense[1:])) > 1e-3


@pytest.mark.parametrize("others", ["carried", "recent"])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_all_retrieval_or_a_covering_budget_is_dense(every: int, kernels: bool, others: str) -> None:
    options = {"budget": 96 if every == 1 else 640, "dense_below": 0, "others": others}
    outs, stats, dense = layers_of(2, 2, 64, 16, [230, 400], [1, 2], every, kernels, **options)
    for a, b in zip(outs, dense):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)
    assert stats[0] == stats[1]
    assert stats[5] == 0


@pytest.mark.parametrize(("programs", "others"), [(1, "carried"), (5, "carried"), (40, "carried"), (5, "recent")])
def test_the_number_of_programs_does_not_matter(programs: int, others: str) -> None:
    """Pieces begin and end inside pairs, cover several pairs, or there are more programs than pages for some."""
    args = 2, 2, 64, 16, [230, 35, 100], [1, 2, 1], 3
    got, stats, _ = layers_of(*args, True, programs, budget=64, dense_below=50, others=others)
    want, expected, _ = layers_of(*args, False, budget=64, dense_below=50, others=others)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)
    assert stats == expected


def test_no_retrieval_head_reads_first_and_last_pages() -> None:
    """Heads without a role, behind a dense first layer: streaming attention by definition, and its counters."""
    n, page = 157, 16
    method = Lychee(page_size=page, sink=1, local=2, roles=roles(2, 3, 2, 64, 9), budget=64, dense_below=0,
                    others="recent", dense_layers=(0,))  # fmt: skip
    stages = method.stages(StageDims(6, 3, 64, 1, 40 * page, 1, DEVICE, torch.float32, (1,)))
    stages.allocate()
    assert stages.roles == {1: [False] * 3}
    p = make([n], [1], 3, 2, 64, page)
    out = torch.empty_like(p.q)
    stages.decode(1, p.q, p.k_cache, p.v_cache, None, batch_of(p, 1), out, p.scale)
    table = p.block_table[0, :10].long()
    seen = [i for i in range(n) if i // page in (0, 7, 8, 9)]
    keys, values = (x[table].transpose(1, 2).flatten(0, 1)[seen].double() for x in (p.k_cache, p.v_cache))
    weights = (torch.einsum("hgd,nhd->hgn", p.q[0].double().view(3, 2, 64), keys) * p.scale).softmax(-1)
    want = torch.einsum("hgn,nhd->hgd", weights, values).flatten(0, 1)
    torch.testing.assert_close(out[0].double(), want, atol=1e-5, rtol=1e-5)
    assert stages.stats.tolist() == [3 * len(seen), 3 * n, 0, 3 * 4, 3, 0, 0, 0]


def test_short_requests_are_exact() -> None:
    outs, stats, dense = layers_of(2, 2, 64, 16, [30, 400], [1, 1], 3, True, budget=96, dense_below=50)
    for a, b in zip(outs, dense):
        torch.testing.assert_close(a[:1], b[:1], atol=2e-4, rtol=2e-4)
    assert stats[5] == 4 * 2
