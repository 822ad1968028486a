"""K2 + K3 in one launch: score the pages of long requests, then choose the list.

Specification: `reference.page_scores` and `reference.select_pages`. A program scores tiles of pages of one request and
KV head; whichever program of a request and head finishes last selects, so that a captured step costs one launch.
The same launch refreshes the index of the page that a decode step completes (K1): that page is always read, so no
program of this step needs its record. Dense requests leave after one load and get `counts = -1`.
Scores of the page index, one a page and KV head, are left to `score_records`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ext.kernels.index_update import KINDS, page_record

SCORES = {"bound": 0, "dot": 1, "exact": 2, "recency": 3}
GROUPS = {"max": 0, "mean": 1, "softmax": 2}
TILE = 64
"""Pages scored at once."""
PROGRAMS = 1056
"""Programs of a launch: eight for each of the 132 SMs of an H100."""
STATS = 8
"""Counters on the device, in the order of `vllm_ext.metrics.NAMES`."""
MAX_PAGES = 16384
"""Longest request, in pages: one program holds all scores of a head when it selects."""


@triton.jit
def _sort_key(x):
    """fp32 -> int32 with the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _threshold(key, free, need):
    """Largest t such that at least `need` free keys are >= t, and how many are; stops as soon as exactly `need` are."""
    low = tl.min(tl.where(free, key, 0x7FFFFFFF), 0).to(tl.int64)
    high = tl.max(tl.where(free, key, -0x80000000), 0).to(tl.int64) + 1
    found = tl.sum(free.to(tl.int32), 0)
    while (high - low > 1) & (found != need):
        middle = low + (high - low) // 2
        count = tl.sum((free & (key >= middle.to(tl.int32))).to(tl.int32), 0)
        if count >= need:
            low = middle
            found = count
        else:
            high = middle
    return low.to(tl.int32), found


@triton.jit
def _choose(
    s, BT, IDS, PAGES, COUNTS, count, first, last, capacity, NB: tl.constexpr, EARLY: tl.constexpr = False
):  # fmt: skip
    """Write the ascending ids (and physical pages) of the `capacity` best of `count` pages; ties to the lower page.

    EARLY: the whole block table is read beside the scores, not the chosen pages' after the search.
    """
    page = tl.arange(0, NB)
    if EARLY:
        phys = tl.load(BT + page, mask=page < count, other=0)
    forced = (page < count) & ((page < first) | (page >= last))
    free = (page < count) & (forced == 0)
    kept = tl.minimum(count, capacity)
    need = kept - tl.sum(forced.to(tl.int32), 0)
    key = _sort_key(s)
    threshold, found = _threshold(key, free, need)
    chosen = forced | (free & (key >= threshold))
    if found != need:  # equal scores at the threshold
        above = free & (key > threshold)
        tied = free & (key == threshold)
        room = need - tl.sum(above.to(tl.int32), 0)
        chosen = forced | above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(IDS + place, page, mask=chosen)
    if not EARLY:
        phys = tl.load(BT + page, mask=chosen, other=0)
    tl.store(PAGES + place, phys, mask=chosen)
    tl.store(IDS + page, -1, mask=(page >= kept) & (page < capacity))
    tl.store(COUNTS, kept)


@triton.jit
def _select(
    SCP, BT, IDS, PAGES, COUNTS, count, rows, first, last, capacity, np_cap, GROUP: tl.constexpr, NB: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Select with the smallest of three block sizes that holds the request's pages and the list."""
    most = tl.maximum(count, capacity)
    if NB > 512 and most <= 512:
        _choose(
            _load_scores(SCP, count, rows, np_cap, GROUP, 512),
            BT, IDS, PAGES, COUNTS, count, first, last, capacity, 512, EARLY,
        )  # fmt: skip
    elif NB > 2048 and most <= 2048:
        _choose(
            _load_scores(SCP, count, rows, np_cap, GROUP, 2048),
            BT, IDS, PAGES, COUNTS, count, first, last, capacity, 2048, EARLY,
        )  # fmt: skip
    else:
        _choose(
            _load_scores(SCP, count, rows, np_cap, GROUP, NB),
            BT, IDS, PAGES, COUNTS, count, first, last, capacity, NB, EARLY and NB <= 2048,
        )  # fmt: skip


@triton.jit
def query_rows(Q, q0, m, head, q_tok, q_head, G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """The m * G query rows of one KV head, zero beyond: [ROWS, DP]; and which rows exist."""
    row = tl.arange(0, ROWS)
    rd = tl.arange(0, DP)
    live = row < m * G
    at = Q + (q0 + row // G)[:, None] * q_tok + (head * G + row % G)[:, None] * q_head + rd[None, :]
    return tl.load(at, mask=live[:, None] & (rd < D)[None, :], other=0.0), live


@triton.jit
def _tile_exact(
    q, K, BT, tile, head, n, m, scale, k_page, k_head, k_tok,
    G: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of the causal logits of every page of the tile: [ROWS, TILE]."""
    rp = tl.arange(0, P)
    rd = tl.arange(0, DP)
    limit = n - m + 1 + tl.arange(0, ROWS) // G
    out = tl.full([ROWS, TILE], float("-inf"), tl.float32)
    for j in range(0, tl.minimum(TILE, tl.cdiv(n, P) - tile * TILE)):
        phys = tl.load(BT + tile * TILE + j).to(tl.int64)
        at = K + phys * k_page + head * k_head + rp[None, :] * k_tok + rd[:, None]
        keys = tl.load(at, mask=(rd < D)[:, None], other=0.0)
        x = tl.dot(q, keys, input_precision="ieee") * scale
        position = (tile * TILE + j) * P + rp
        x = tl.where(position[None, :] < limit[:, None], x, float("-inf"))
        top = tl.max(x, 1)
        safe = tl.where(top == float("-inf"), 0.0, top)
        lse = safe + tl.log(tl.sum(tl.exp(x - safe[:, None]), 1))
        out = tl.where((tl.arange(0, TILE) == j)[None, :], lse[:, None], out)
    return out


@triton.jit
def _tile_indexed(
    q, INDEX, BT, tile, head, n, scale, radius, i_page, i_head,
    SCORE: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Quest bound or mean-key logit of every complete page of the tile: [ROWS, TILE], -inf for others."""
    page = tile * TILE + tl.arange(0, TILE)
    rd = tl.arange(0, DP)
    complete = page < n // P
    phys = tl.load(BT + page, mask=complete, other=0).to(tl.int64)
    at = INDEX + phys[None, :] * i_page + head * i_head + rd[:, None]
    ok = complete[None, :] & (rd < D)[:, None]
    low = tl.load(at, mask=ok, other=0.0)
    if SCORE == 0:
        high = tl.load(at + D, mask=ok, other=0.0)
        # q . centre + radius |q| . half_range as two products; radius 1 gives max(q, 0) . max + min(q, 0) . min.
        half, reach = 0.5 * q.to(tl.float32), 0.5 * radius * tl.abs(q.to(tl.float32))
        x = tl.dot((half + reach).to(q.dtype), high, input_precision="ieee")
        x = tl.dot((half - reach).to(q.dtype), low, x, input_precision="ieee")
    else:
        x = tl.dot(q, low, input_precision="ieee")
    return tl.where(complete[None, :], x * scale, float("-inf"))


@triton.jit
def _load_scores(SC, count, rows, np_cap, GROUP: tl.constexpr, NB: tl.constexpr):
    """One score per page, reduced over rows if that is left to do; past L1, where other programs' stores are seen."""
    page = tl.arange(0, NB)
    if GROUP == 2:
        s = tl.zeros([NB], tl.float32)
        for i in range(0, rows):
            x = tl.load(SC + i * np_cap + page, mask=page < count, other=float("-inf"), cache_modifier=".cg")
            top = tl.max(x, 0)
            e = tl.exp(x - tl.where(top == float("-inf"), 0.0, top))
            s += e / tl.maximum(tl.sum(e, 0), 1e-30)
    else:
        s = tl.load(SC + page, mask=page < count, other=float("-inf"), cache_modifier=".cg")
    return s


@triton.jit
def _count(STATS, read, visible, scored, pages, is_sparse: tl.constexpr):
    """Add one request and head to the counters (order of `vllm_ext.metrics.NAMES`)."""
    tl.atomic_add(STATS, read.to(tl.int64), sem="relaxed")
    tl.atomic_add(STATS + 1, visible.to(tl.int64), sem="relaxed")
    if is_sparse:
        tl.atomic_add(STATS + 2, scored.to(tl.int64), sem="relaxed")
        tl.atomic_add(STATS + 3, pages.to(tl.int64), sem="relaxed")
        tl.atomic_add(STATS + 4, 1, sem="relaxed")
    else:
        tl.atomic_add(STATS + 5, 1, sem="relaxed")


@triton.jit
def _write_list(
    SC, BT, IDS, PAGES, COUNTS, STATS, pair, n, m, rows, real, scored, capacity, sink, local, np_cap,
    GROUP: tl.constexpr, P: tl.constexpr, NB: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """The list of one request and KV head whose scores, from SC on, are written, and its counters."""
    count = tl.cdiv(n, P)
    first = tl.minimum(sink, count)
    last = tl.maximum(0, tl.minimum(count - local, (n - m) // P))
    at = pair.to(tl.int64) * capacity
    _select(
        SC, BT, IDS + at, PAGES + at, COUNTS + pair, count, rows, first, last, capacity, np_cap, GROUP, NB, EARLY
    )  # fmt: skip
    if real:
        kept = tl.minimum(count, capacity)
        _count(STATS, kept * P - (count * P - n), n, scored, kept, True)


@triton.jit
def _score_select(
    Q, K, INDEX, BT, SEQ, START, DENSE, SLOTS, SC, IDS, PAGES, COUNTS, TICKET, STATS,
    scale, radius, dense_limit, capacity, sink, local, np_cap, bt_row,
    q_tok, q_head, k_page, k_head, k_tok, i_page, i_head,
    H: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
    TILE: tl.constexpr, NB: tl.constexpr, SCORE: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    SC_ROWS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    worker = tl.program_id(1)
    r = pair // H
    head = pair % H
    n = tl.load(SEQ + r)
    q0 = tl.load(START + r)
    m = tl.load(START + r + 1) - q0
    if n == 0 or m == 0:
        return
    if (worker == 0) & (KIND >= 0):
        for t in range(0, m):
            slot = tl.load(SLOTS + q0 + t).to(tl.int64)
            if slot >= 0 and slot % P == P - 1:
                page_record(K, INDEX, slot // P, head, k_page, k_head, k_tok, i_page, i_head, KIND, P, D)
    real = tl.load(SLOTS + q0) >= 0  # warm-up and capture runs are not counted
    if (n <= dense_limit) | (tl.load(DENSE + r) != 0):
        if worker == 0:
            tl.store(COUNTS + pair, -1)
            if real:
                _count(STATS, n, n, n, n, False)
        return
    count = tl.cdiv(n, P)
    tiles = tl.cdiv(count, TILE)
    active = tl.minimum(tiles, tl.num_programs(1))
    if worker >= active:
        return
    SCP = SC + pair.to(tl.int64) * np_cap * SC_ROWS
    table = BT + r * bt_row
    if SCORE != 3:
        q, live = query_rows(Q, q0, m, head, q_tok, q_head, G, ROWS, D, DP)
    for tile in range(worker, tiles, active):
        page = tile * TILE + tl.arange(0, TILE)
        if SCORE == 3:
            tl.store(SCP + page, page.to(tl.float32), mask=page < count)
        else:
            if SCORE == 2:
                x = _tile_exact(q, K, table, tile, head, n, m, scale, k_page, k_head, k_tok, G, ROWS, P, D, DP, TILE)
            else:
                # a page that this step completes is read anyway, and another program may be writing its record
                x = _tile_indexed(
                    q, INDEX, table, tile, head, n - m, scale, radius, i_page, i_head, SCORE, P, D, DP, TILE
                )
            if GROUP == 0:
                tl.store(SCP + page, tl.max(tl.where(live[:, None], x, float("-inf")), 0), mask=page < count)
            elif GROUP == 1:
                tl.store(SCP + page, tl.sum(tl.where(live[:, None], x, 0.0), 0) / (m * G), mask=page < count)
            else:
                row = tl.arange(0, ROWS)
                tl.store(SCP + row[:, None] * np_cap + page[None, :], x, mask=live[:, None] & (page < count)[None, :])
    tl.debug_barrier()  # every thread's scores are written before the ticket says so
    if tl.atomic_add(TICKET + pair, 1, sem="acq_rel") == active - 1:
        tl.store(TICKET + pair, 0)  # ready for the next layer
        scored = count if SCORE != 3 else 0
        _write_list(
            SCP, table, IDS, PAGES, COUNTS, STATS, pair, n, m, m * G, real, scored, capacity, sink, local, np_cap,
            GROUP, P, NB,
        )  # fmt: skip


@dataclass
class SelectBuffers:
    """Scratch and results of `score_select`, allocated once per engine so that captured steps find them again."""

    scores: Tensor
    ids: Tensor
    pages: Tensor
    counts: Tensor
    ticket: Tensor
    stats: Tensor

    @classmethod
    def allocate(
        cls,
        requests: int,
        heads: int,
        rows: int,
        pages: int,
        capacity: int,
        group: str,
        device: torch.device | str,
        stats: Tensor | None = None,
    ) -> SelectBuffers:
        """Room for `requests` requests of `pages` pages with `rows` query rows a KV head; counts into `stats`."""
        kept_rows = rows if group == "softmax" else 1

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            zeros(requests, heads, kept_rows, pages, dtype=torch.float32),
            zeros(requests, heads, capacity),
            zeros(requests, heads, capacity),
            zeros(requests, heads),
            zeros(requests, heads),
            zeros(STATS, dtype=torch.int64) if stats is None else stats,
        )


def padded_rows(m: int, g: int) -> int:
    """Query rows of one KV head as a matrix-unit tile: a power of two of at least 16."""
    return max(16, triton.next_power_of_2(m * g))


def score_select(
    q: Tensor,
    k_cache: Tensor,
    index: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    always_dense: Tensor,
    slot_mapping: Tensor,
    buffers: SelectBuffers,
    *,
    max_query_len: int,
    scale: float,
    dense_limit: int,
    capacity: int,
    sink: int,
    local: int,
    score: str,
    group: str,
    index_kind: str,
    radius: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill `buffers.ids`, `buffers.pages` [R, H, capacity] and `buffers.counts` [R, H]; shapes as in `reference`.

    Args:
        always_dense: [R] int32, nonzero = read every key (a prompt that is still being prefilled).
        slot_mapping: [T] int64; completed pages get their index here, so `update_index` is not needed as well.
        max_query_len: most query tokens of a request (1 + drafts); a constant of the captured graph.
        dense_limit: requests of up to this many keys are dense.
        radius: share of the half-range in the score `bound`; 1 = Quest's upper bound.

    Returns:
        (ids, pages, counts): logical pages, the same as physical pages, and how many; views of the buffers.
    """
    requests, heads = seq_lens.shape[0], k_cache.shape[1]
    g, d, page = q.shape[1] // heads, q.shape[2], k_cache.shape[2]
    np_cap = buffers.scores.shape[3]
    ind = index if index is not None else k_cache
    kind = KINDS.get(index_kind, -1) if index is not None else -1
    if score in ("bound", "dot") and group in ("max", "mean"):
        from vllm_ext.kernels.score_records import score_records  # which imports this module

        score_records(
            q, k_cache, ind, block_table, seq_lens, query_start_loc, always_dense, slot_mapping, buffers,
            max_query_len=max_query_len, scale=scale, radius=radius, dense_limit=dense_limit, capacity=capacity,
            sink=sink, local=local, score=SCORES[score], group=GROUPS[group], kind=kind,
        )  # fmt: skip
        return buffers.ids[:requests], buffers.pages[:requests], buffers.counts[:requests]
    workers = max(1, min(triton.cdiv(np_cap, TILE), PROGRAMS // (requests * heads)))
    _score_select[(requests * heads, workers)](
        q, k_cache, ind, block_table, seq_lens, query_start_loc, always_dense, slot_mapping,
        buffers.scores, buffers.ids, buffers.pages, buffers.counts, buffers.ticket, buffers.stats,
        scale, radius, dense_limit, capacity, sink, local, np_cap, block_table.stride(0),
        q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        ind.stride(0), ind.stride(1),
        H=heads, G=g, ROWS=padded_rows(max_query_len, g), D=d, DP=triton.next_power_of_2(d), P=page,
        TILE=TILE, NB=triton.next_power_of_2(max(np_cap, capacity)), SCORE=SCORES[score], GROUP=GROUPS[group],
        KIND=kind, SC_ROWS=buffers.scores.shape[2], num_warps=4,
    )  # fmt: skip
    return buffers.ids[:requests], buffers.pages[:requests], buffers.counts[:requests]
