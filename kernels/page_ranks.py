"""The pages of each query row in order of their scores, for `mass_select`: two launches, scores and ranks.

Specification: `reference_mass.select_mass`. Each row is sorted once, by one program, so that whatever asks for a rank
later (probes, the shortest prefix) loads it. Keys and page numbers are sorted as one integer: ties to the lower page.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_ext.kernels.page_clusters import tile_clusters
from vllm_ext.kernels.reference_mass import CENTRES
from vllm_ext.kernels.score_select import MAX_PAGES, _count, _sort_key, _tile_indexed, query_rows

_FIRST, _SECOND = (tl.constexpr(c) for c in CENTRES)
_BITS = tl.constexpr((MAX_PAGES - 1).bit_length())
_PAGE = tl.constexpr(MAX_PAGES - 1)


@triton.jit
def row_scores(
    Q, INDEX, BT, SEQ, START, DENSE, SLOTS, SC, COUNTS, STATS,
    scale, dense_limit, np_cap, bt_row, q_tok, q_head, i_page, i_head,
    H: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
    TILE: tl.constexpr, SC_ROWS: tl.constexpr, CLUSTERS: tl.constexpr,
):  # fmt: skip
    """Scores of every page and row, by mean key or clusters; dense requests get the count -1 and are counted."""
    pair = tl.program_id(0)
    worker = tl.program_id(1)
    r = pair // H
    head = pair % H
    n = tl.load(SEQ + r)
    q0 = tl.load(START + r)
    m = tl.load(START + r + 1) - q0
    prompt = tl.load(DENSE + r)
    if (n == 0) | (m == 0):
        return
    if (n <= dense_limit) | (prompt != 0):
        if worker == 0:
            tl.store(COUNTS + pair, -1)
            if tl.load(SLOTS + q0) >= 0:
                _count(STATS, n, n, n, n, False)
        return
    if worker == 0:
        tl.store(COUNTS + pair, 0)
    count = tl.cdiv(n, P)
    q, live = query_rows(Q, q0, m, head, q_tok, q_head, G, ROWS, D, DP)
    row = tl.arange(0, ROWS)
    SCP = SC + pair.to(tl.int64) * np_cap * SC_ROWS
    for tile in range(worker, tl.cdiv(count, TILE), tl.num_programs(1)):
        if CLUSTERS > 0:
            x = tile_clusters(
                q, INDEX, BT + r * bt_row, tile, head, n, scale, i_page, i_head, CLUSTERS, P, D, DP, ROWS, TILE
            )
        else:
            x = _tile_indexed(q, INDEX, BT + r * bt_row, tile, head, n, scale, 1.0, i_page, i_head, 1, P, D, DP, TILE)
        page = tile * TILE + tl.arange(0, TILE)
        tl.store(SCP + row[:, None] * np_cap + page[None, :], x, mask=live[:, None] & (page < count)[None, :])


@triton.jit
def ranks(free, exact, sample):
    """`Mass.ranks`: ends of the exact ranks, starts of the two segments, width of a segment."""
    size = free.to(tl.float32)
    head = tl.maximum(1, tl.ceil(size * exact).to(tl.int32))
    width = tl.maximum(1, tl.ceil(size * sample).to(tl.int32))
    first = tl.maximum(head, (size * _FIRST).to(tl.int32) - width // 2)
    second = tl.maximum(head, (size * _SECOND).to(tl.int32) - width // 2)
    second = tl.maximum(second, first + width)
    few = second + width > free
    head = tl.where(few, free, head)
    first = tl.where(few, free, first)
    second = tl.where(few, free, second)
    width = tl.where(few, 0, width)
    return head, first, second, width


@triton.jit
def free_pages(n, m, sink, local, P: tl.constexpr):
    """First page, and end, of those that are not forced; how many pages there are."""
    count = tl.cdiv(n, P)
    first = tl.minimum(sink, count)
    last = tl.maximum(first, tl.minimum(count - local, (n - m) // P))
    return first, last, count


@triton.jit
def _rank_row(SC, BT, RANKED, PROBES, first, last, count, exact, sample, NB: tl.constexpr):
    """One row: scores by rank, and the physical pages to probe: forced ones, the first ranks, two segments."""
    page = tl.arange(0, NB)
    is_free = (page >= first) & (page < last)
    is_forced = (page < count) & (is_free == 0)
    phys = tl.load(BT + page, mask=is_forced, other=0)
    score = tl.load(SC + page, mask=is_free, other=0.0) + 0.0  # -0.0 ties with 0.0
    later = tl.full([NB], 1 << 62, tl.int64)
    order = tl.sort(tl.where(is_free, ((-1 - _sort_key(score)).to(tl.int64) << _BITS) + page, later))
    rank = page
    free = last - first
    is_ranked = rank < free
    key = (-1 - (order >> _BITS)).to(tl.int32)
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    tl.store(RANKED + rank, bits.to(tl.float32, bitcast=True), mask=is_ranked)
    top, one, two, width = ranks(free, exact, sample)
    behind = tl.where(rank < one, rank, tl.where(rank < two, rank - one + top, rank - two + top + width))
    in_one = (rank >= one) & (rank < one + width)
    in_two = (rank >= two) & (rank < two + width)
    is_probe = is_ranked & ((rank < top) | in_one | in_two)
    forced = count - free
    found = tl.load(BT + (order & _PAGE).to(tl.int32), mask=is_probe, other=0)
    tl.store(PROBES + forced + behind, found, mask=is_probe)
    tl.store(PROBES + tl.where(page < first, page, page - free), phys, mask=is_forced)


@triton.jit
def rank_pages(
    SC, BT, SEQ, START, COUNTS, RANKED, PROBES, exact, sample, sink, local, np_cap, probe_cap, bt_row,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, NB: tl.constexpr, SC_ROWS: tl.constexpr,
):  # fmt: skip
    """A program a row; where a quarter of the block holds the request's pages, that is sorted."""
    pair = tl.program_id(0)
    i = tl.program_id(1)
    r = pair // H
    n = tl.load(SEQ + r)
    m = tl.load(START + r + 1) - tl.load(START + r)
    dense = tl.load(COUNTS + pair) < 0
    if (n == 0) | (i >= m * G):
        return
    first, last, count = free_pages(n, m, sink, local, P)
    if dense | (first == last):
        return
    row = pair.to(tl.int64) * SC_ROWS + i
    scores = SC + row * np_cap
    table = BT + r.to(tl.int64) * bt_row
    ranked = RANKED + row * np_cap
    probes = PROBES + row * probe_cap
    if NB > 512 and count <= NB // 4:
        _rank_row(scores, table, ranked, probes, first, last, count, exact, sample, NB // 4)
    else:
        _rank_row(scores, table, ranked, probes, first, last, count, exact, sample, NB)
