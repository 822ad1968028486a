"""InfLLM-V2's selection in two launches: coarse log-sum-exp, then fine window scores and the choice of pages.

Specification: `reference_windows` for records and scores, `reference.select_pages` for the choice. The fine scores of
single heads never reach memory: a program adds up the heads of a group in registers. The first launch also writes the
records of pages that the step completes; windows of those pages are not scored in this step, so that no program waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ext.kernels.score_select import PROGRAMS, TILE, _choose, _count, padded_rows, query_rows

MAX_WORKERS = 32
"""Most programs of one request and KV head: what the second launch merges in one go."""


@triton.jit
def _write_record(
    K, INDEX, BT, page, head, k_page, k_head, k_tok, i_page, i_head, P: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Record of logical page `page` of the request whose block table is BT, 64 channels at a time."""
    here = tl.load(BT + page).to(tl.int64)
    before = tl.load(BT + tl.maximum(page - 1, 0)).to(tl.int64)
    rq = tl.arange(0, P // 4)
    for c in tl.static_range(0, D, 64):
        rd = c + tl.arange(0, 64)
        ok = rd < D
        dst = INDEX + here * i_page + head * i_head + rd
        at = K + head * k_head + rq[:, None] * k_tok + rd[None, :]
        old = tl.zeros([64], tl.float32)  # sum of the page before
        last = tl.zeros([64], tl.float32)  # of the quarter before
        for i in tl.static_range(4):
            x = tl.load(at + before * k_page + i * (P // 4) * k_tok, mask=ok[None, :], other=0.0)
            last = tl.sum(x.to(tl.float32), 0)
            old += last
        new = tl.zeros([64], tl.float32)
        for i in tl.static_range(4):
            x = tl.load(at + here * k_page + i * (P // 4) * k_tok, mask=ok[None, :], other=0.0)
            quarter = tl.sum(x.to(tl.float32), 0)
            fine = (last + quarter) / (P // 2)
            if i == 0:
                fine = tl.where(page > 0, fine, 0.0)
            tl.store(dst + i * D, fine.to(INDEX.dtype.element_ty), mask=ok)
            last = quarter
            new += quarter
        coarse = tl.where(page > 0, (old + new) / (2 * P), 0.0)
        tl.store(dst + 4 * D, coarse.to(INDEX.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize_on_alignment=["BT", "SEQ", "START"])
def _update_windows(
    K, INDEX, BT, SEQ, START, bt_row, k_page, k_head, k_tok, i_page, i_head, P: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0)
    n = tl.load(SEQ + r)
    m = tl.load(START + r + 1) - tl.load(START + r)
    page = (n - m) // P + tl.program_id(1)
    if (n > 0) & (m > 0) & (page < n // P):
        table = BT + r.to(tl.int64) * bt_row
        _write_record(K, INDEX, table, page, tl.program_id(2), k_page, k_head, k_tok, i_page, i_head, P, D)


@triton.jit
def _coarse(
    Q, K, INDEX, BT, SEQ, START, DENSE, SLOTS, COUNTS, PL, STATS, scale, dense_limit, bt_row,
    q_tok, q_head, k_page, k_head, k_tok, i_page, i_head,
    H: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    worker = tl.program_id(1)
    workers = tl.num_programs(1)
    r = pair // H
    head = pair % H
    n = tl.load(SEQ + r)
    q0 = tl.load(START + r)
    m = tl.load(START + r + 1) - q0
    if n == 0 or m == 0:
        return
    done = (n - m) // P
    table = BT + r.to(tl.int64) * bt_row
    real = tl.load(SLOTS + q0) >= 0
    if (worker == 0) & real:
        for page in range(done, n // P):
            _write_record(K, INDEX, table, page, head, k_page, k_head, k_tok, i_page, i_head, P, D)
    if (n <= dense_limit) | (tl.load(DENSE + r) != 0):
        if worker == 0:
            tl.store(COUNTS + pair, -1)
            if real:
                _count(STATS, n, n, n, n, False)
        return
    q, _ = query_rows(Q, q0, m, head, q_tok, q_head, G, ROWS, D, DP)
    rd = tl.arange(0, DP)
    top = tl.full([ROWS], -1e30, tl.float32)
    den = tl.zeros([ROWS], tl.float32)
    for tile in range(worker, tl.cdiv(done, TILE), workers):
        page = tile * TILE + tl.arange(0, TILE)
        ok = (page > 0) & (page < done)
        phys = tl.load(table + page, mask=ok, other=0).to(tl.int64)
        at = INDEX + phys[None, :] * i_page + head * i_head + 4 * D + rd[:, None]
        mean = tl.load(at, mask=ok[None, :] & (rd < D)[:, None], other=0.0)
        x = tl.where(ok[None, :], tl.dot(q, mean, input_precision="ieee") * scale, -float("inf"))
        new = tl.maximum(top, tl.max(x, 1))
        den = den * tl.exp(top - new) + tl.sum(tl.exp(x - new[:, None]), 1)
        top = new
    lse = tl.where(den > 0, top + tl.log(tl.where(den > 0, den, 1.0)), -float("inf"))
    row = tl.arange(0, ROWS)
    tl.store(PL + (pair.to(tl.int64) * workers + worker) * ROWS + row, lse)


@triton.jit
def _window(q, INDEX, at, ok, lse, live, rows, scale, v, G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
            DP: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Group-summed weight of fine window v of a tile of pages, largest over the query tokens: [TILE]."""
    rd = tl.arange(0, DP)
    row = tl.arange(0, ROWS)
    mean = tl.load(INDEX + at[None, :] + v * D + rd[:, None], mask=ok[None, :] & (rd < D)[:, None], other=0.0)
    x = tl.dot(q, mean, input_precision="ieee") * scale - lse[:, None]
    weight = tl.where(live[:, None], tl.exp(x), 0.0)
    best = tl.zeros([TILE], tl.float32)
    for first in range(0, rows, G):
        mine = (row >= first) & (row < first + G)
        best = tl.maximum(best, tl.sum(tl.where(mine[:, None], weight, 0.0), 0))
    return tl.where(ok, best, -float("inf"))


@triton.jit
def _scores_of(SC, done, np_cap, NB: tl.constexpr):
    """Largest of a page's own four windows and the first of the next page: [NB]; past L1."""
    page = tl.arange(0, NB)
    own = tl.load(SC + page, mask=page < done, other=float("-inf"), cache_modifier=".cg")
    after = tl.load(SC + np_cap + page + 1, mask=page + 1 < done, other=float("-inf"), cache_modifier=".cg")
    return tl.maximum(own, after)


@triton.jit
def _fine_select(
    Q, INDEX, BT, SEQ, START, DENSE, SLOTS, PL, SC, IDS, PAGES, COUNTS, TICKET, STATS,
    scale, dense_limit, capacity, sink, local, np_cap, bt_row, q_tok, q_head, i_page, i_head,
    H: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
    TILE: tl.constexpr, NB: tl.constexpr, WB: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    worker = tl.program_id(1)
    workers = tl.num_programs(1)
    r = pair // H
    head = pair % H
    n = tl.load(SEQ + r)
    q0 = tl.load(START + r)
    m = tl.load(START + r + 1) - q0
    if n == 0 or m == 0:
        return
    if (n <= dense_limit) | (tl.load(DENSE + r) != 0):
        return
    done = (n - m) // P
    count = tl.cdiv(n, P)
    tiles = tl.cdiv(done, TILE)
    active = tl.maximum(1, tl.minimum(tiles, workers))
    if worker >= active:
        return
    table = BT + r.to(tl.int64) * bt_row
    row = tl.arange(0, ROWS)
    part = tl.arange(0, WB)
    at = PL + (pair.to(tl.int64) * workers + part[:, None]) * ROWS + row[None, :]
    parts = tl.load(at, mask=(part < workers)[:, None], other=float("-inf"))
    top = tl.max(parts, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(parts - top[None, :]), 0)
    lse = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), 0.0)  # no coarse window yet: any value
    q, live = query_rows(Q, q0, m, head, q_tok, q_head, G, ROWS, D, DP)
    SCP = SC + pair.to(tl.int64) * np_cap * 2
    for tile in range(worker, tiles, active):
        page = tile * TILE + tl.arange(0, TILE)
        ok = page < done
        phys = tl.load(table + page, mask=ok, other=0).to(tl.int64)
        src = phys * i_page + head * i_head
        rows = m * G
        first = _window(q, INDEX, src, ok & (page > 0), lse, live, rows, scale, 0, G, ROWS, D, DP, TILE)
        own = first
        for v in tl.static_range(1, 4):
            own = tl.maximum(own, _window(q, INDEX, src, ok, lse, live, rows, scale, v, G, ROWS, D, DP, TILE))
        tl.store(SCP + page, own, mask=ok)
        tl.store(SCP + np_cap + page, first, mask=ok)
    tl.debug_barrier()  # every thread's scores are written before the ticket says so
    if tl.atomic_add(TICKET + pair, 1, sem="acq_rel") == active - 1:
        tl.store(TICKET + pair, 0)  # ready for the next layer
        first_free = tl.minimum(sink, count)
        last = tl.maximum(0, tl.minimum(count - local, done))
        out = pair.to(tl.int64) * capacity
        most = tl.maximum(count, capacity)
        ID = IDS + out
        PG = PAGES + out
        CN = COUNTS + pair
        if NB > 512 and most <= 512:
            _choose(_scores_of(SCP, done, np_cap, 512), table, ID, PG, CN, count, first_free, last, capacity, 512)
        elif NB > 2048 and most <= 2048:
            _choose(_scores_of(SCP, done, np_cap, 2048), table, ID, PG, CN, count, first_free, last, capacity, 2048)
        else:
            _choose(_scores_of(SCP, done, np_cap, NB), table, ID, PG, CN, count, first_free, last, capacity, NB)
        if tl.load(SLOTS + q0) >= 0:
            kept = tl.minimum(count, capacity)
            _count(STATS, kept * P - (count * P - n), n, done, kept, True)


@dataclass
class WindowBuffers:
    """Scratch and results of `window_select`, allocated once per engine so that captured steps find them again."""

    scores: Tensor
    partial: Tensor
    ids: Tensor
    pages: Tensor
    counts: Tensor
    ticket: Tensor
    stats: Tensor

    @classmethod
    def allocate(
        cls, requests: int, heads: int, rows: int, pages: int, capacity: int, device: torch.device | str, stats: Tensor
    ) -> WindowBuffers:
        """Room for `requests` requests of `pages` pages with `rows` query rows a KV head; counts into `stats`."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        parts = max(r * heads * workers_for(r * heads, pages) for r in range(1, requests + 1))
        return cls(
            zeros(requests, heads, 2, pages, dtype=torch.float32),
            zeros(parts, padded_rows(rows, 1), dtype=torch.float32),
            zeros(requests, heads, capacity),
            zeros(requests, heads, capacity),
            zeros(requests, heads),
            zeros(requests, heads),
            stats,
        )


def workers_for(pairs: int, pages: int) -> int:
    """Programs of one request and KV head."""
    return max(1, min(triton.cdiv(pages, TILE), PROGRAMS // pairs, MAX_WORKERS))


def update_windows(
    k_cache: Tensor, index: Tensor, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor, longest: int
) -> None:
    """Write the records of all pages that prompt chunks complete; see `reference_windows.update_windows`.

    Args:
        seq_lens: [R] int32 with this step's tokens; query_start_loc: [R + 1] int32; longest: most tokens of a chunk.
    """
    requests, heads, page = seq_lens.shape[0], k_cache.shape[1], k_cache.shape[2]
    if not requests:
        return
    _update_windows[(requests, longest // page + 1, heads)](
        k_cache, index, block_table, seq_lens, query_start_loc, block_table.stride(0),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), index.stride(0), index.stride(1),
        P=page, D=k_cache.shape[3],
    )  # fmt: skip


def window_select(
    q: Tensor, k_cache: Tensor, index: Tensor, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor,
    always_dense: Tensor, slot_mapping: Tensor, buffers: WindowBuffers, *, max_query_len: int, scale: float,
    dense_limit: int, capacity: int, sink: int, local: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Lists of a decode batch by window scores; arguments and results as of `score_select.score_select`.

    `index` is [num_pages, H, 5, D], see `reference_windows`.
    """
    requests, heads = seq_lens.shape[0], k_cache.shape[1]
    g, d = q.shape[1] // heads, q.shape[2]
    np_cap, rows = buffers.scores.shape[3], padded_rows(max_query_len, g)
    workers = workers_for(requests * heads, np_cap)
    shape = {
        "H": heads, "G": g, "ROWS": rows, "D": d, "DP": triton.next_power_of_2(d), "P": k_cache.shape[2], "TILE": TILE,
    }  # fmt: skip
    _coarse[(requests * heads, workers)](
        q, k_cache, index, block_table, seq_lens, query_start_loc, always_dense, slot_mapping, buffers.counts,
        buffers.partial, buffers.stats, scale, dense_limit, block_table.stride(0), q.stride(0), q.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), index.stride(0), index.stride(1), **shape,
    )  # fmt: skip
    _fine_select[(requests * heads, workers)](
        q, index, block_table, seq_lens, query_start_loc, always_dense, slot_mapping, buffers.partial,
        buffers.scores, buffers.ids, buffers.pages, buffers.counts, buffers.ticket, buffers.stats,
        scale, dense_limit, capacity, sink, local, np_cap, block_table.stride(0), q.stride(0), q.stride(1),
        index.stride(0), index.stride(1), **shape,
        NB=triton.next_power_of_2(max(np_cap, capacity)), WB=triton.next_power_of_2(workers),
    )  # fmt: skip
    return buffers.ids[:requests], buffers.pages[:requests], buffers.counts[:requests]
