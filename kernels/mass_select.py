"""Pages by attention mass in two launches: scores of all pages, then probes, fit and lists.

Specification: `reference_mass.select_mass`. In the second launch a program serves one query row; the last row of a
request and KV head writes the union.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ext.kernels.index_update import page_record
from vllm_ext.kernels.page_clusters import cluster_record, tile_clusters
from vllm_ext.kernels.reference_mass import CENTRES, Mass
from vllm_ext.kernels.score_select import (
    PROGRAMS,
    TILE,
    _choose,
    _count,
    _sort_key,
    _threshold,
    _tile_indexed,
    padded_rows,
    query_rows,
)

_FIRST, _SECOND = (tl.constexpr(c) for c in CENTRES)


@triton.jit
def _row_scores(
    Q, K, INDEX, BT, SEQ, START, DENSE, SLOTS, SC, COUNTS, STATS,
    scale, dense_limit, iterations, np_cap, bt_row, q_tok, q_head, k_page, k_head, k_tok, i_page, i_head,
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
    if (n == 0) | (m == 0):
        return
    if worker == 0:
        for t in range(0, m):
            slot = tl.load(SLOTS + q0 + t).to(tl.int64)
            if slot >= 0 and slot % P == P - 1:
                if CLUSTERS > 0:
                    cluster_record(
                        K, INDEX, slot // P, head, k_page, k_head, k_tok, i_page, i_head, iterations, CLUSTERS, P, D
                    )
                else:
                    page_record(K, INDEX, slot // P, head, k_page, k_head, k_tok, i_page, i_head, 1, P, D)
    if (n <= dense_limit) | (tl.load(DENSE + r) != 0):
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
def _ranks(free, exact, sample):
    """`Mass.ranks`."""
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
def _above(key, free, need):
    """The `need` largest free keys, ties to the lower page."""
    threshold, found = _threshold(key, free, need)
    best = tl.where(free & (key >= threshold), 1, 0)
    if found != need:  # equal keys at the threshold
        tied = tl.where(free & (key == threshold), 1, 0)
        over = tl.where(free & (key > threshold), 1, 0)
        best = over + tl.where(tl.cumsum(tied, 0) <= need - tl.sum(over, 0), tied, 0)
    return (best > 0) & (best * need > 0)


@triton.jit
def _fitted(a, b, low, high):
    """`reference_mass.fitted_mass` between ranks low and high (both + 0.5 here)."""
    end = tl.where(b < 0, tl.minimum(high, tl.maximum(low, -a / tl.minimum(b, -1e-30))), high)
    return a * tl.log(end / low) + b * (end - low)


@triton.jit
def _fit(y1, y2, first, second, width):
    """`reference_mass.fit`."""
    w = tl.maximum(width, 1).to(tl.float32)
    c1 = tl.log((first + w + 0.5) / (first + 0.5)) / w
    c2 = tl.log((second + w + 0.5) / (second + 0.5)) / w
    a = tl.where(y1 <= y2, 0.0, (y1 - y2) / (c1 - c2))
    b = tl.where(y1 <= y2, (y1 + y2) / 2, y1 - a * c1)
    return a, b


@triton.jit
def _page_mass(Q, K, BT, PROBES, MASS, probes, n, limit, scale, k_page, k_tok, P: tl.constexpr, D: tl.constexpr,
               DP: tl.constexpr):  # fmt: skip
    """Log-sum-exp of the causal logits of each probed page, stored by page number; returns the largest."""
    rp = tl.arange(0, P)
    rd = tl.arange(0, DP)
    q = tl.load(Q + rd, mask=rd < D, other=0.0).to(tl.float32)
    best = -float("inf")
    for j in range(0, probes):
        page = tl.load(PROBES + j, cache_modifier=".cg")
        phys = tl.load(BT + page).to(tl.int64)
        keys = tl.load(K + phys * k_page + rp[:, None] * k_tok + rd[None, :], mask=(rd < D)[None, :], other=0.0)
        x = tl.sum(keys.to(tl.float32) * q[None, :], 1) * scale
        x = tl.where(page * P + rp < limit, x, float("-inf"))
        top = tl.max(x, 0)
        safe = tl.where(top == float("-inf"), 0.0, top)
        lse = safe + tl.log(tl.sum(tl.exp(x - safe), 0))
        tl.store(MASS + page, lse)
        best = tl.maximum(best, lse)
    return best


@triton.jit
def _kept(key, free_page, is_head, w, forced, head, y1, y2, first, second, width, free, mass):
    """Threshold on `key` of the pages that a row keeps; 0x7FFFFFFF = none (`reference_mass.kept_ranks`)."""
    a, b = _fit(y1, y2, first.to(tl.float32), second.to(tl.float32), width)
    low = head.to(tl.float32) + 0.5
    exact = forced + tl.sum(tl.where(is_head, w, 0.0), 0)
    rest = tl.where(head < free, _fitted(a, b, low, free.to(tl.float32) + 0.5), 0.0)
    need = mass * (exact + rest)
    threshold = tl.full([], 0x7FFFFFFF, tl.int32)
    if mass >= 1:
        threshold = tl.full([], -0x7FFFFFFF, tl.int32)
    elif forced < need:
        if exact >= need:  # inside the exact ranks
            lo = tl.min(tl.where(is_head, key, 0x7FFFFFFF), 0).to(tl.int64)
            hi = tl.max(tl.where(is_head, key, -0x80000000), 0).to(tl.int64) + 1
            while hi - lo > 1:
                middle = lo + (hi - lo) // 2
                if forced + tl.sum(tl.where(is_head & (key >= middle.to(tl.int32)), w, 0.0), 0) >= need:
                    lo = middle
                else:
                    hi = middle
            threshold = lo.to(tl.int32)
        else:
            x0 = head
            x1 = free
            while x1 - x0 > 1:
                x = (x0 + x1) // 2
                if exact + _fitted(a, b, low, x.to(tl.float32) + 0.5) >= need:
                    x1 = x
                else:
                    x0 = x
            threshold, _ = _threshold(key, free_page, x1)
            threshold = tl.min(tl.where(free_page & (key >= threshold), key, 0x7FFFFFFF), 0)
    return threshold


@triton.jit
def _mass_select(
    Q, K, BT, SEQ, START, SLOTS, SC, MASS, PROBES, EDGE, IDS, PAGES, COUNTS, TICKET, STATS,
    scale, capacity, sink, local, mass, exact, sample, np_cap, bt_row, q_tok, q_head, k_page, k_head, k_tok,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, NB: tl.constexpr,
    SC_ROWS: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    i = tl.program_id(1)
    r = pair // H
    head = pair % H
    n = tl.load(SEQ + r)
    q0 = tl.load(START + r)
    m = tl.load(START + r + 1) - q0
    if (n == 0) | (i >= m * G):
        return
    if tl.load(COUNTS + pair) < 0:
        return
    count = tl.cdiv(n, P)
    first = tl.minimum(sink, count)
    last = tl.maximum(0, tl.minimum(count - local, (n - m) // P))
    table = BT + r.to(tl.int64) * bt_row
    row = pair.to(tl.int64) * SC_ROWS + i
    page = tl.arange(0, NB)
    inside = page < count
    free_page = inside & (page >= first) & (page < last)
    forced_page = inside & (free_page == 0)
    free = tl.maximum(last - first, 0)
    key = _sort_key(tl.load(SC + row * np_cap + page, mask=inside, other=float("-inf")))
    top, one, two, width = _ranks(free, exact, sample)
    is_head = _above(key, free_page, top)
    is_one = _above(key, free_page, one + width) & (_above(key, free_page, one) == 0)
    is_two = _above(key, free_page, two + width) & (_above(key, free_page, two) == 0)
    probe = tl.where(forced_page | is_head | is_one | is_two, 1, 0) > 0
    probes = tl.sum(probe.to(tl.int32), 0)
    tl.store(PROBES + row * np_cap + tl.cumsum(probe.to(tl.int32), 0) - 1, page, mask=probe)
    tl.debug_barrier()
    token = q0 + i // G
    best = _page_mass(
        Q + token * q_tok + (head * G + i % G) * q_head, K + head * k_head, table, PROBES + row * np_cap,
        MASS + row * np_cap, probes, n, n - m + 1 + i // G, scale, k_page, k_tok, P, D, DP,
    )  # fmt: skip
    tl.debug_barrier()
    w = tl.load(MASS + row * np_cap + page, mask=probe, other=float("-inf"), cache_modifier=".cg")
    w = tl.exp(w - best)
    forced = tl.sum(tl.where(forced_page, w, 0.0), 0)
    size = tl.maximum(width, 1).to(tl.float32)
    y1 = tl.sum(tl.where(is_one, w, 0.0), 0) / size
    y2 = tl.sum(tl.where(is_two, w, 0.0), 0) / size
    edge = _kept(key, free_page, is_head, w, forced, top, y1, y2, one, two, width, free, mass)
    tl.store(EDGE + row, edge)
    real = tl.load(SLOTS + q0) >= 0
    if real:
        tl.atomic_add(STATS + 6, (probes * (P * D * ELEMENT)).to(tl.int64), sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(TICKET + pair, 1, sem="acq_rel") == m * G - 1:
        tl.store(TICKET + pair, 0)
        margin = tl.full([NB], float("-inf"), tl.float32)
        for j in range(0, m * G):
            at = pair.to(tl.int64) * SC_ROWS + j
            edge = tl.load(EDGE + at, cache_modifier=".cg")
            s = tl.load(SC + at * np_cap + page, mask=inside, other=float("-inf"))
            bits = tl.where(edge < 0, edge ^ 0x7FFFFFFF, edge)
            over = s - tl.where(edge <= -0x7FFFFFFF, -3.0e38, bits.to(tl.float32, bitcast=True))
            kept_here = (edge < 0x7FFFFFFF) & (_sort_key(s) >= edge)
            margin = tl.maximum(margin, tl.where(kept_here, tl.maximum(over, 0.0), margin))
        total = tl.sum((forced_page | (free_page & (margin >= 0))).to(tl.int32), 0)
        kept = tl.minimum(total, capacity)
        at = pair.to(tl.int64) * capacity
        _choose(margin, table, IDS + at, PAGES + at, COUNTS + pair, count, first, last, kept, NB)
        tl.store(IDS + at + page, -1, mask=(page >= kept) & (page < capacity))
        if real:
            _count(STATS, kept * P - (count * P - n), n, count, kept, True)
            tl.atomic_add(STATS + 7, (total > capacity).to(tl.int64), sem="relaxed")


@dataclass
class MassBuffers:
    """Scratch and results of `mass_select`, allocated once."""

    scores: Tensor
    mass: Tensor
    probes: Tensor
    edges: Tensor
    ids: Tensor
    pages: Tensor
    counts: Tensor
    ticket: Tensor

    @classmethod
    def allocate(
        cls, requests: int, heads: int, rows: int, pages: int, capacity: int, device: torch.device | str
    ) -> MassBuffers:
        """Room for `requests` requests of `pages` pages with `rows` query rows a KV head."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        wide = (requests, heads, rows, pages)
        return cls(
            zeros(*wide, dtype=torch.float32), zeros(*wide, dtype=torch.float32), zeros(*wide),
            zeros(requests, heads, rows), zeros(requests, heads, capacity), zeros(requests, heads, capacity),
            zeros(requests, heads), zeros(requests, heads),
        )  # fmt: skip


def mass_select(
    q: Tensor,
    k_cache: Tensor,
    index: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    always_dense: Tensor,
    slot_mapping: Tensor,
    stats: Tensor,
    buffers: MassBuffers,
    target: Mass,
    *,
    max_query_len: int,
    scale: float,
    dense_limit: int,
    capacity: int,
    sink: int,
    local: int,
    clusters: int = 0,
    iterations: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill the lists of `buffers`; arguments and result as of `score_select`.

    Args:
        clusters: of a page; `index` then holds the records of `page_clusters`, with 0 mean keys.
        iterations: rounds of K-means for the pages that this step completes.
    """
    requests, heads = seq_lens.shape[0], k_cache.shape[1]
    g, d = q.shape[1] // heads, q.shape[2]
    sc_rows, np_cap = buffers.scores.shape[2:]
    dp, page = triton.next_power_of_2(d), k_cache.shape[2]
    workers = max(1, min(triton.cdiv(np_cap, TILE), PROGRAMS // (requests * heads)))
    _row_scores[(requests * heads, workers)](
        q, k_cache, index, block_table, seq_lens, query_start_loc, always_dense, slot_mapping, buffers.scores,
        buffers.counts, stats, scale, dense_limit, iterations, np_cap, block_table.stride(0), q.stride(0), q.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), index.stride(0), index.stride(1),
        H=heads, G=g, ROWS=padded_rows(max_query_len, g), D=d, DP=dp, P=page, TILE=TILE, SC_ROWS=sc_rows,
        CLUSTERS=clusters, num_warps=4,
    )  # fmt: skip
    _mass_select[(requests * heads, max_query_len * g)](
        q, k_cache, block_table, seq_lens, query_start_loc, slot_mapping, buffers.scores, buffers.mass, buffers.probes,
        buffers.edges, buffers.ids, buffers.pages, buffers.counts, buffers.ticket, stats,
        scale, capacity, sink, local, target.mass, target.exact, target.sample, np_cap, block_table.stride(0),
        q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        H=heads, G=g, D=d, DP=dp, P=page, NB=triton.next_power_of_2(max(np_cap, capacity)), SC_ROWS=sc_rows,
        ELEMENT=k_cache.element_size(), num_warps=4,
    )  # fmt: skip
    return buffers.ids[:requests], buffers.pages[:requests], buffers.counts[:requests]
