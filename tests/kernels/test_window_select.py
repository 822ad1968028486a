"""InfLLM-V2's records, scores and lists: kernels against the reference, and the reference against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from paged import DEVICE, Paged, make

from vllm_ext.kernels import reference, reference_windows
from vllm_ext.kernels.score_select import STATS
from vllm_ext.kernels.window_select import WindowBuffers, update_windows, window_select

SHAPES = {  # lens, queries, KV heads, group, head size, page
    "one_token": ([700, 333, 64], [1, 1, 1], 2, 4, 64, 16),
    "odd_group_3": ([515, 50], [1, 1], 2, 3, 64, 16),
    "drafts": ([700, 97, 16], [4, 4, 4], 1, 3, 64, 16),
    "completes_pages": ([256, 131], [1, 4], 2, 2, 80, 16),
    "padded_request": ([300, 0, 90], [1, 0, 1], 1, 2, 64, 16),
    "paper_blocks": ([1500], [1], 1, 2, 128, 64),
}
KW = {"sink": 1, "local": 3}


def fill(p: Paged, before_step: bool = True) -> None:
    """Records by the reference: of pages complete before this step, or of all complete pages."""
    for r, n in enumerate(p.lens):
        end = (n - (p.starts[r + 1] - p.starts[r] if before_step else 0)) // p.page
        reference_windows.update_windows(p.k_cache, p.index, p.block_table[r].long(), 0, end)


def run(p: Paged, capacity: int, dense_limit: int = 0) -> tuple[torch.Tensor, torch.Tensor, WindowBuffers]:
    heads, np_cap = p.k_cache.shape[1], p.block_table.shape[1]
    m = max(b - a for a, b in zip(p.starts, p.starts[1:]))
    rows = m * p.q.shape[1] // heads
    stats = torch.zeros(STATS, dtype=torch.int64, device=DEVICE)
    buffers = WindowBuffers.allocate(len(p.lens), heads, rows, np_cap, capacity, DEVICE, stats)
    ids, _, counts = window_select(
        p.q, p.k_cache, p.index, p.block_table, p.seq_lens, p.query_start_loc, torch.zeros_like(p.seq_lens),
        p.slot_mapping, buffers, max_query_len=m, scale=p.scale, dense_limit=dense_limit, capacity=capacity, **KW,
    )  # fmt: skip
    return ids, counts, buffers


def expected(p: Paged, r: int, capacity: int) -> torch.Tensor:
    n, rows = p.lens[r], slice(p.starts[r], p.starts[r + 1])
    pages = p.block_table[r, : reference.page_count(n, p.page)].long()
    s = reference_windows.window_scores(p.q[rows], p.index, pages, n, p.page, p.scale)
    return reference.select_pages(s, n, rows.stop - rows.start, p.page, capacity, **KW)


@pytest.mark.parametrize("name", SHAPES)
def test_lists_equal_reference(name: str) -> None:
    p = make(*SHAPES[name], records=5)
    fill(p)
    ids, counts, buffers = run(p, capacity=7)
    want_index = make(*SHAPES[name], records=5)
    fill(want_index, before_step=False)
    for r, n in enumerate(p.lens):
        if not n:
            continue
        want = expected(p, r, 7)
        assert torch.equal(ids[r, :, : want.shape[1]].cpu(), want.cpu())
        assert (ids[r, :, want.shape[1] :] == -1).all()
        assert (counts[r] == want.shape[1]).all()
        done = p.block_table[r, : n // p.page].long()  # pages that this step completes got their record too
        assert torch.allclose(p.index[done], want_index.index[done], atol=1e-5)
    assert (buffers.ticket == 0).all()
    again, _, _ = run(p, capacity=7)
    assert torch.equal(ids, again)


def test_dense_requests_and_counters() -> None:
    p = make([100, 60, 200], [1, 1, 1], 2, 2, 64, 16, records=5)
    fill(p)
    _, counts, buffers = run(p, capacity=5, dense_limit=64)
    assert counts.tolist() == [[5, 5], [-1, -1], [5, 5]]
    read = 2 * ((80 - (112 - 100)) + 60 + (80 - (208 - 200)))
    assert buffers.stats.tolist() == [read, 2 * 360, 2 * (6 + 12), 2 * 10, 4, 2, 0, 0]


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_records_of_a_prompt_chunk(layout: str) -> None:
    """Only pages that the chunk completes are written; the first one looks back into the page before the chunk."""
    p = make([150, 70], [86, 70], 2, 1, 96, 16, layout=layout, records=5)
    want = make([150, 70], [86, 70], 2, 1, 96, 16, layout=layout, records=5)
    for r, (first, end) in enumerate(((4, 9), (0, 4))):
        reference_windows.update_windows(want.k_cache, want.index, want.block_table[r].long(), first, end)
    update_windows(p.k_cache, p.index, p.block_table, p.seq_lens, p.query_start_loc, 86)
    assert torch.equal(p.index.isnan(), want.index.isnan())
    assert torch.allclose(p.index.nan_to_num(), want.index.nan_to_num(), atol=1e-5)


def test_scores_are_the_papers() -> None:
    """Section 3: means over [16 j, 16 j + 32) and [64 j, 64 j + 128); block b takes windows 4 b - 1 .. 4 b + 3."""
    n, heads, g, d = 64 * 6 + 5, 2, 4, 32
    p = make([n], [1], heads, g, d, 64, records=5)
    fill(p)
    pages = p.block_table[0, :7].long()
    got = reference_windows.window_scores(p.q, p.index, pages, n, 64, p.scale)
    keys = p.k_cache[pages].transpose(0, 1).flatten(1, 2)[:, : 64 * 6].float()
    fine = keys.unfold(1, 32, 16).mean(-1)
    coarse = keys.unfold(1, 128, 64).mean(-1)
    q = reference.grouped(p.q, heads)
    lse = (q @ coarse.transpose(1, 2) * p.scale).logsumexp(-1)
    s = ((q @ fine.transpose(1, 2)) * p.scale - lse[..., None]).exp().sum(1)
    for b in range(6):
        windows = [j for j in range(4 * b - 1, 4 * b + 4) if 0 <= j < s.shape[1]]
        assert torch.allclose(got[:, b], s[:, windows].amax(1), rtol=1e-4)
    assert (got[:, 6] == -math.inf).all()
