"""Pages by attention mass in four launches: scores, ranks (`page_ranks`), probes with the fit, lists.

Specification: `reference_mass.select_mass`. The masses of the probed pages, most of the bytes, are computed by several
programs a row; the last one fits the row's curve and finds its worst page to keep. A program a request and KV head then
writes the union of the rows. The probing launch, the longest, also writes the records of pages that the step completes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ext.kernels.index_update import page_record
from vllm_ext.kernels.page_clusters import cluster_record
from vllm_ext.kernels.page_ranks import free_pages, rank_pages, ranks, row_scores
from vllm_ext.kernels.reference_mass import Mass
from vllm_ext.kernels.score_select import PROGRAMS, TILE, _count, _sort_key, _threshold, padded_rows

SMS = 132
"""Of an H100."""
MOST_SPLITS = 32
"""Most programs that probe for one row."""


@triton.jit
def _records(
    K, INDEX, START, SLOTS, r, head, iterations, k_page, k_head, k_tok, i_page, i_head,
    P: tl.constexpr, D: tl.constexpr, CLUSTERS: tl.constexpr,
):  # fmt: skip
    """Records of the pages that a request completes; they are always read, so no score of this step needs them."""
    for token in range(tl.load(START + r), tl.load(START + r + 1)):
        slot = tl.load(SLOTS + token).to(tl.int64)
        if slot >= 0 and slot % P == P - 1:
            if CLUSTERS > 0:
                cluster_record(
                    K, INDEX, slot // P, head, k_page, k_head, k_tok, i_page, i_head, iterations, CLUSTERS, P, D
                )
            else:
                page_record(K, INDEX, slot // P, head, k_page, k_head, k_tok, i_page, i_head, 1, P, D)


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
def _kept_ranks(MASS, forced, free, top, one, two, width, mass, PB: tl.constexpr):
    """`reference_mass.kept_ranks` from the log masses of a row's probes."""
    at = tl.arange(0, PB)
    rank = at - forced
    lse = tl.load(MASS + at, mask=rank < top + 2 * width, other=float("-inf"), cache_modifier=".cg")
    most = tl.max(lse, 0)
    w = tl.exp(lse - tl.where(most == float("-inf"), 0.0, most))
    is_head = (rank >= 0) & (rank < top)
    reached = tl.sum(tl.where(rank < 0, w, 0.0), 0)
    size = tl.maximum(width, 1).to(tl.float32)
    y1 = tl.sum(tl.where((rank >= top) & (rank < top + width), w, 0.0), 0) / size
    y2 = tl.sum(tl.where(rank >= top + width, w, 0.0), 0) / size
    prefix = reached + tl.cumsum(tl.where(is_head, w, 0.0), 0)
    exact = tl.max(prefix, 0)
    a, b = _fit(y1, y2, one.to(tl.float32), two.to(tl.float32), width)
    low = top.to(tl.float32) + 0.5
    need = mass * (exact + tl.where(top < free, _fitted(a, b, low, free.to(tl.float32) + 0.5), 0.0))
    kept = tl.zeros([], tl.int32)
    if mass >= 1:
        kept = free
    elif reached < need:
        if exact >= need:
            kept = 1 + tl.sum((is_head & (prefix < need)).to(tl.int32), 0)
        else:
            x = top
            kept = free
            while kept - x > 1:
                middle = (x + kept) // 2
                if exact + _fitted(a, b, low, middle.to(tl.float32) + 0.5) >= need:
                    kept = middle
                else:
                    x = middle
    return kept


@triton.jit
def _log_mass(keys, q, visible, scale):
    """Log-sum-exp of the visible logits of a page: keys [P, DP], visible [P]."""
    x = tl.sum(keys.to(tl.float32) * q[None, :], 1) * scale
    x = tl.where(visible, x, float("-inf"))
    top = tl.max(x, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    return safe + tl.log(tl.sum(tl.exp(x - safe), 0))


@triton.jit(do_not_specialize=["lanes"])
def _probe_pages(
    Q, K, INDEX, SEQ, START, SLOTS, COUNTS, RANKED, PROBES, MASS, EDGE, TICKET, STATS,
    lanes, scale, iterations, sink, local, mass, exact, sample, np_cap, probe_cap,
    q_tok, q_head, k_page, k_head, k_tok, i_page, i_head,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, PB: tl.constexpr,
    SC_ROWS: tl.constexpr, ELEMENT: tl.constexpr, CLUSTERS: tl.constexpr, MOST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`lanes` programs a request and KV head, for MOST rows at most; in front of them one each for the records."""
    pairs = tl.num_programs(0) // (lanes + 1)
    work = tl.program_id(0) - pairs
    if work < 0:
        pair = work + pairs
        r = pair // H
        if tl.load(SEQ + r) != 0:
            _records(
                K, INDEX, START, SLOTS, r, pair % H, iterations, k_page, k_head, k_tok, i_page, i_head, P, D, CLUSTERS
            )
        return
    pair = work // lanes
    i = work % lanes % MOST  # rows of a pair run side by side: pages that they share come from the L2 cache
    split = work % lanes // MOST
    r = pair // H
    head = pair % H
    n = tl.load(SEQ + r)
    q0 = tl.load(START + r)
    m = tl.load(START + r + 1) - q0
    dense = tl.load(COUNTS + pair) < 0
    if (n == 0) | (i >= m * G) | dense:
        return
    first, last, count = free_pages(n, m, sink, local, P)
    free = last - first
    forced = count - free
    top, one, two, width = ranks(free, exact, sample)
    probes = tl.where(free > 0, forced + top + 2 * width, 0)
    rp = tl.arange(0, P)
    rd = tl.arange(0, DP)
    q = tl.load(Q + (q0 + i // G) * q_tok + (head * G + i % G) * q_head + rd, mask=rd < D, other=0.0).to(tl.float32)
    row = pair.to(tl.int64) * SC_ROWS + i
    visible = n - m + 1 + i // G
    at = K + head * k_head + rp[:, None] * k_tok + rd[None, :]
    for j in tl.range(split, probes, lanes // MOST, num_stages=STAGES):
        phys = tl.load(PROBES + row * probe_cap + j).to(tl.int64)
        if D == DP:
            keys = tl.load(at + phys * k_page)
        else:
            keys = tl.load(at + phys * k_page, mask=(rd < D)[None, :], other=0.0)
        page = tl.where(j < first, j, tl.where(j < forced, j + free, 0))  # no free page holds a query token
        tl.store(MASS + row * probe_cap + j, _log_mass(keys, q, page * P + rp < visible, scale))
    tl.debug_barrier()  # every thread's masses are written before the ticket says so
    if tl.atomic_add(TICKET + row, 1, sem="acq_rel") == lanes // MOST - 1:
        tl.store(TICKET + row, 0)  # ready for the next layer
        kept = tl.zeros([], tl.int32)
        if free > 0:
            kept = _kept_ranks(MASS + row * probe_cap, forced, free, top, one, two, width, mass, PB)
        worst = tl.load(RANKED + row * np_cap + kept - 1, mask=kept > 0, other=float("inf"))
        tl.store(EDGE + row, worst)
        if tl.load(SLOTS + q0) >= 0:
            tl.atomic_add(STATS + 6, (probes * (P * D * ELEMENT)).to(tl.int64), sem="relaxed")


@triton.jit
def _write_lists(
    SC, BT, SEQ, START, SLOTS, EDGE, IDS, PAGES, COUNTS, STATS, capacity, sink, local, np_cap, bt_row,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, NB: tl.constexpr, SC_ROWS: tl.constexpr,
):  # fmt: skip
    """The union of the rows; of more than `capacity` pages those that are farthest above the worst one of some row."""
    pair = tl.program_id(0)
    r = pair // H
    n = tl.load(SEQ + r)
    q0 = tl.load(START + r)
    m = tl.load(START + r + 1) - q0
    dense = tl.load(COUNTS + pair) < 0
    if (n == 0) | (m == 0) | dense:
        return
    first, last, count = free_pages(n, m, sink, local, P)
    page = tl.arange(0, NB)
    is_free = (page >= first) & (page < last)
    chosen = (page < count) & (is_free == 0)
    phys = tl.load(BT + r.to(tl.int64) * bt_row + page, mask=page < count, other=0)
    margin = tl.full([NB], float("-inf"), tl.float32)
    TOGETHER: tl.constexpr = 4 if NB <= 2048 else 1  # rows whose scores are in registers
    for j in range(0, m * G, TOGETHER):
        i = j + tl.arange(0, TOGETHER)
        at = pair.to(tl.int64) * SC_ROWS + i
        edge = tl.load(EDGE + at, mask=i < m * G, other=float("inf"))
        s = tl.load(SC + at[:, None] * np_cap + page[None, :], mask=(i < m * G)[:, None] & is_free[None, :], other=0.0)
        over = tl.where(s >= edge[:, None], s - edge[:, None], float("-inf"))
        margin = tl.maximum(margin, tl.max(over, 0))
    wanted = is_free & (margin >= 0)
    forced = count - (last - first)
    total = forced + tl.sum(wanted.to(tl.int32), 0)
    if total > capacity:
        key = _sort_key(margin)
        need = capacity - forced
        threshold, found = _threshold(key, wanted, need)
        above = wanted & (key > threshold)
        tied = wanted & (key == threshold)
        if found != need:
            tied = tied & (tl.cumsum(tied.to(tl.int32), 0) <= need - tl.sum(above.to(tl.int32), 0))
        wanted = above | tied
    chosen = chosen | wanted
    kept = tl.minimum(total, capacity)
    place = pair.to(tl.int64) * capacity + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(IDS + place, page, mask=chosen)
    tl.store(PAGES + place, phys, mask=chosen)
    tl.store(IDS + pair.to(tl.int64) * capacity + page, -1, mask=(page >= kept) & (page < capacity))
    tl.store(COUNTS + pair, kept)
    if tl.load(SLOTS + q0) >= 0:
        _count(STATS, kept * P - (count * P - n), n, count, kept, True)
        tl.atomic_add(STATS + 7, (total > capacity).to(tl.int64), sem="relaxed")


@dataclass(frozen=True)
class ProbePlan:
    """How pages are probed: with enough of them in flight, and no more programs than run at once."""

    warps: int
    stages: int
    programs: int

    @classmethod
    def of(cls, page_bytes: int, clusters: int) -> ProbePlan:
        """For pages of `page_bytes` of keys a KV head; the code that makes clusters needs many registers."""
        wide = page_bytes > 16384
        together = max(2, min(12, 65536 // page_bytes))
        if clusters:
            together = min(together, 1 if wide else 3)
        return cls(8 if wide else 4, 2 if page_bytes > 32768 else 3 if wide else 4, SMS * together)


@dataclass
class MassBuffers:
    """Scratch and results of `mass_select`, allocated once."""

    scores: Tensor
    ranked: Tensor
    probes: Tensor
    mass: Tensor
    edges: Tensor
    ticket: Tensor
    ids: Tensor
    pages: Tensor
    counts: Tensor

    @classmethod
    def allocate(
        cls, requests: int, heads: int, rows: int, pages: int, capacity: int, probes: int, device: torch.device | str
    ) -> MassBuffers:
        """Room for `requests` requests of `pages` pages with `rows` query rows a KV head that probe `probes` pages."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        row = (requests, heads, rows)
        return cls(
            zeros(*row, pages, dtype=torch.float32), zeros(*row, pages, dtype=torch.float32),
            zeros(*row, probes), zeros(*row, probes, dtype=torch.float32), zeros(*row, dtype=torch.float32),
            zeros(*row), zeros(requests, heads, capacity), zeros(requests, heads, capacity), zeros(requests, heads),
        )  # fmt: skip


def probe_room(target: Mass, pages: int, page: int, max_query_len: int, sink: int, local: int) -> int:
    """Most pages that a row of a request of up to `pages` pages of `page` keys probes: the size of buffers."""
    forced = sink + max(local, 1 + -(-(max_query_len - 1) // page))
    return min(pages, forced + target.most_ranks(pages))


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
    g, d, page = q.shape[1] // heads, q.shape[2], k_cache.shape[2]
    sc_rows, np_cap = buffers.scores.shape[2:]
    probe_cap, bt_row = buffers.probes.shape[3], block_table.stride(0)
    pairs, rows, dp = requests * heads, max_query_len * g, triton.next_power_of_2(d)
    sizes = {"H": heads, "G": g, "P": page, "SC_ROWS": sc_rows}
    workers = max(1, min(triton.cdiv(np_cap, TILE), PROGRAMS // pairs))
    row_scores[(pairs, workers)](
        q, index, block_table, seq_lens, query_start_loc, always_dense, slot_mapping, buffers.scores, buffers.counts,
        stats, scale, dense_limit, np_cap, bt_row, q.stride(0), q.stride(1), index.stride(0), index.stride(1),
        ROWS=padded_rows(max_query_len, g), D=d, DP=dp, TILE=TILE, CLUSTERS=clusters, **sizes, num_warps=4,
    )  # fmt: skip
    block = max(16, triton.next_power_of_2(np_cap))
    rank_pages[(pairs, rows)](
        buffers.scores, block_table, seq_lens, query_start_loc, buffers.counts, buffers.ranked, buffers.probes,
        target.exact, target.sample, sink, local, np_cap, probe_cap, bt_row, NB=block, **sizes,
        num_warps=block_warps(block),
    )  # fmt: skip
    plan = ProbePlan.of(page * dp * k_cache.element_size(), clusters)
    lanes = rows * max(1, min(MOST_SPLITS, probe_cap, plan.programs // (pairs * rows)))
    _probe_pages[(pairs * (1 + lanes),)](
        q, k_cache, index, seq_lens, query_start_loc, slot_mapping, buffers.counts, buffers.ranked, buffers.probes,
        buffers.mass, buffers.edges, buffers.ticket, stats,
        lanes, scale, iterations, sink, local, target.mass, target.exact, target.sample, np_cap, probe_cap,
        q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), index.stride(0),
        index.stride(1), D=d, DP=dp, PB=triton.next_power_of_2(probe_cap), ELEMENT=k_cache.element_size(),
        CLUSTERS=clusters, MOST=rows, STAGES=plan.stages, **sizes, num_warps=plan.warps,
    )  # fmt: skip
    block = triton.next_power_of_2(max(np_cap, capacity))
    _write_lists[(pairs,)](
        buffers.scores, block_table, seq_lens, query_start_loc, slot_mapping, buffers.edges, buffers.ids,
        buffers.pages, buffers.counts, stats, capacity, sink, local, np_cap, bt_row, NB=block, **sizes,
        num_warps=block_warps(block),
    )  # fmt: skip
    return buffers.ids[:requests], buffers.pages[:requests], buffers.counts[:requests]


def block_warps(block: int) -> int:
    """Warps of a program that holds a block of a row's pages in registers: 8 entries a thread, 16 of long rows."""
    return max(4, block // (256 if block <= 4096 else 512))
