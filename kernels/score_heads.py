"""K2 + K3 with the KV heads of a page side by side, for scores that read the page index.

Specification: `reference.page_scores` and `reference.select_pages`, as of `score_select`, which launches this. The
records of a page's KV heads are adjacent, so a program that scores several heads reads longer pieces and looks up fewer
addresses. The block table is read one tile ahead: the loads of records then depend on no load of their own iteration,
and the compiler keeps several tiles in flight. The first tile's, and the queries, are read before the length is known.
With `FUSED` the program that finishes last selects, head by head; without, a second launch does, for all at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ext.kernels.index_update import page_record
from vllm_ext.kernels.score_select import _count, _select

if TYPE_CHECKING:
    from vllm_ext.kernels.score_select import Plan, SelectBuffers

MOST_ROWS = 64
"""Most query rows of a program's KV heads together: products of a row with other heads' records are thrown away."""


@triton.jit
def _finish(
    SC, BT, IDS, PAGES, COUNTS, STATS, pair, n, m, real, capacity, sink, local, np_cap,
    P: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """The list of one request and KV head whose scores are written, and its counters."""
    count = tl.cdiv(n, P)
    first = tl.minimum(sink, count)
    last = tl.maximum(0, tl.minimum(count - local, (n - m) // P))
    at = pair.to(tl.int64) * capacity
    _select(
        SC + pair.to(tl.int64) * np_cap, BT, IDS + at, PAGES + at, COUNTS + pair, count, m, first, last, capacity,
        np_cap, 0, NB, True,
    )  # fmt: skip
    if real:
        kept = tl.minimum(count, capacity)
        _count(STATS, kept * P - (count * P - n), n, count, kept, True)


@triton.jit
def _query_columns(
    Q, q0, tokens, h0, q_tok, q_head, G: tl.constexpr, MR: tl.constexpr, HB: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Rows of HB KV heads, MR to a head, from query token q0 on: [DP, ROWS]; zero behind the last token."""
    row = tl.arange(0, ROWS)
    rd = tl.arange(0, DP)
    token = q0 + row % MR // G
    head = (h0 + row // MR) * G + row % MR % G
    ok = (token < tokens) & (row < HB * MR)
    at = Q + token[None, :] * q_tok + head[None, :] * q_head + rd[:, None]
    return tl.load(at, mask=ok[None, :] & (rd < D)[:, None], other=0.0)


@triton.jit(do_not_specialize=["width", "tokens"])
def _score_heads(
    Q, K, INDEX, BT, SEQ, START, DENSE, SLOTS, SC, IDS, PAGES, COUNTS, TICKET, STATS,
    scale, radius, dense_limit, capacity, sink, local, np_cap, bt_row, width, tokens,
    q_tok, q_head, k_page, k_head, k_tok, i_page, i_head,
    H: tl.constexpr, HB: tl.constexpr, G: tl.constexpr, M: tl.constexpr, MR: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr, NB: tl.constexpr, SCORE: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, FUSED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    r = tl.program_id(0) // (H // HB)
    h0 = tl.program_id(0) % (H // HB) * HB
    worker = tl.program_id(1)
    table = BT + r * bt_row
    column = tl.arange(0, TILE * HB)  # of a tile: the heads of its first page, of its second page, ...
    of_page = column // HB
    of_head = column % HB
    n = tl.load(SEQ + r)
    q0 = tl.load(START + r)
    m = tl.load(START + r + 1) - q0
    prompt = tl.load(DENSE + r)
    page = worker * TILE + of_page
    # Before the length and the first token are known: pages are used where complete, M tokens a request is the rule.
    phys = tl.load(table + page, mask=page < width, other=0)
    q = _query_columns(Q, r * M, tokens, h0, q_tok, q_head, G, MR, HB, ROWS, D, DP)
    if n == 0 or m == 0:
        return
    real = tl.load(SLOTS + q0) >= 0  # warm-up and capture runs are not counted
    dense = (n <= dense_limit) | (prompt != 0)
    count = tl.where(dense, 0, tl.cdiv(n, P))
    tiles = tl.cdiv(count, TILE)
    active = tl.minimum(tiles, tl.num_programs(1))
    pair = r * H + h0
    if worker < active:
        if q0 != r * M:
            q = _query_columns(Q, q0, tokens, h0, q_tok, q_head, G, MR, HB, ROWS, D, DP)
        row = tl.arange(0, ROWS)
        mine = ((row // MR)[None, :] == of_head[:, None]) & (row % MR < m * G)[None, :]
        rd = tl.arange(0, DP)
        # q . centre + radius |q| . half_range as two products; radius 1 gives max(q, 0) . max + min(q, 0) . min.
        half, reach = 0.5 * q.to(tl.float32), 0.5 * radius * tl.abs(q.to(tl.float32))
        up, down = (half + reach).to(q.dtype), (half - reach).to(q.dtype)
        score = SC + (pair + of_head).to(tl.int64) * np_cap
        for tile in range(worker, tiles, active):
            page = tile * TILE + of_page
            complete = page < n // P
            at = INDEX + phys.to(tl.int64)[:, None] * i_page + (h0 + of_head)[:, None] * i_head + rd[None, :]
            ok = complete[:, None] & (rd < D)[None, :]
            low = tl.load(at, mask=ok, other=0.0)
            if SCORE == 0:
                high = tl.load(at + D, mask=ok, other=0.0)
                x = tl.dot(high, up, input_precision="ieee")
                x = tl.dot(low, down, x, input_precision="ieee")
            else:
                x = tl.dot(low, q, input_precision="ieee")
            following = (tile + active) * TILE + of_page
            phys = tl.load(table + following, mask=following < count, other=0)
            if GROUP == 0:
                s = tl.max(tl.where(mine, x * scale, float("-inf")), 1)
            else:
                s = tl.sum(tl.where(mine, x * scale, 0.0), 1) / (m * G)
            tl.store(score + page, tl.where(complete, s, float("-inf")), mask=page < count)
        if FUSED:
            tl.debug_barrier()  # every thread's scores are written before the ticket says so
            if tl.atomic_add(TICKET + pair, 1, sem="acq_rel") == active - 1:
                tl.store(TICKET + pair, 0)  # ready for the next layer
                for h in range(0, HB):
                    _finish(
                        SC, table, IDS, PAGES, COUNTS, STATS, pair + h, n, m, real, capacity, sink, local, np_cap, P, NB
                    )
    if FUSED and (dense & (worker == 0)):
        for h in range(0, HB):
            tl.store(COUNTS + pair + h, -1)
            if real:
                _count(STATS, n, n, n, n, False)
    if KIND >= 0:  # K1, last: the page that a step completes is always read, no score of this step matters
        for h in range(worker, HB, tl.num_programs(1)):
            for t in range(0, m):
                slot = tl.load(SLOTS + q0 + t).to(tl.int64)
                if slot >= 0 and slot % P == P - 1:
                    page_record(K, INDEX, slot // P, h0 + h, k_page, k_head, k_tok, i_page, i_head, KIND, P, D)


@triton.jit
def _select_lists(
    BT, SEQ, START, DENSE, SLOTS, SC, IDS, PAGES, COUNTS, STATS, dense_limit, capacity, sink, local, np_cap, bt_row,
    H: tl.constexpr, P: tl.constexpr, NB: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    r = pair // H
    n = tl.load(SEQ + r)
    q0 = tl.load(START + r)
    m = tl.load(START + r + 1) - q0
    prompt = tl.load(DENSE + r)
    if PDL:
        tl.extra.cuda.gdc_wait()  # in every program, before any returns: what follows waits for this launch alone
    if n == 0 or m == 0:
        return
    real = tl.load(SLOTS + q0) >= 0
    if (n <= dense_limit) | (prompt != 0):
        tl.store(COUNTS + pair, -1)
        if real:
            _count(STATS, n, n, n, n, False)
        return
    _finish(
        SC, BT + r * bt_row, IDS, PAGES, COUNTS, STATS, pair, n, m, real, capacity, sink, local, np_cap, P, NB
    )  # fmt: skip


@cache
def dependent_launches() -> bool:
    """Whether the device knows programmatic dependent launches."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@dataclass(frozen=True)
class Sizes:
    """Compile-time sizes of `_score_heads` that follow from a plan and a batch's shape."""

    heads: int
    head_rows: int
    rows: int
    tile: int

    @classmethod
    def of(cls, plan: Plan, heads: int, rows: int) -> Sizes:
        """For `heads` KV heads with up to `rows` query rows each: as many heads a program as divide and fit."""
        head_rows = triton.next_power_of_2(rows)
        together = math.gcd(heads, plan.heads)
        while together > 1 and together * head_rows > MOST_ROWS:
            together //= 2
        return cls(together, head_rows, max(16, together * head_rows), max(1, plan.columns // together))


def score_heads(
    q: Tensor, k_cache: Tensor, index: Tensor, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor,
    always_dense: Tensor, slot_mapping: Tensor, buffers: SelectBuffers, plan: Plan, *, max_query_len: int,
    scale: float, radius: float, dense_limit: int, capacity: int, sink: int, local: int, score: int, group: int,
    kind: int,
) -> None:  # fmt: skip
    """Fill the buffers as `score_select` does; `score`, `group`, `kind` are its compile-time numbers.

    Scores `bound` and `dot`, groups `max` and `mean`: one score a page and KV head.
    """
    requests, heads = seq_lens.shape[0], k_cache.shape[1]
    g, d, page = q.shape[1] // heads, q.shape[2], k_cache.shape[2]
    np_cap = buffers.scores.shape[3]
    sizes = Sizes.of(plan, heads, max_query_len * g)
    groups = requests * heads // sizes.heads
    workers = max(1, min(triton.cdiv(np_cap, sizes.tile), plan.programs // groups))
    block = triton.next_power_of_2(max(np_cap, capacity))
    fused_block = block if plan.fused else 1  # one kernel for all lengths where it does not select
    pdl = plan.pdl and not plan.fused and q.device.type != "cpu" and dependent_launches()
    _score_heads[(groups, workers)](
        q, k_cache, index, block_table, seq_lens, query_start_loc, always_dense, slot_mapping,
        buffers.scores, buffers.ids, buffers.pages, buffers.counts, buffers.ticket, buffers.stats,
        scale, radius, dense_limit, capacity, sink, local, np_cap, block_table.stride(0), block_table.shape[1],
        q.shape[0], q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), index.stride(0),
        index.stride(1),
        H=heads, HB=sizes.heads, G=g, M=max_query_len, MR=sizes.head_rows, ROWS=sizes.rows, D=d,
        DP=triton.next_power_of_2(d), P=page, TILE=sizes.tile, NB=fused_block, SCORE=score, GROUP=group,
        KIND=kind, FUSED=plan.fused, PDL=pdl, num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    if not plan.fused:
        _select_lists[(requests * heads,)](
            block_table, seq_lens, query_start_loc, always_dense, slot_mapping, buffers.scores, buffers.ids,
            buffers.pages, buffers.counts, buffers.stats, dense_limit, capacity, sink, local, np_cap,
            block_table.stride(0), H=heads, P=page, NB=block, PDL=pdl, num_warps=4,
            **({"launch_pdl": True} if pdl else {}),  # not every Triton knows it
        )  # fmt: skip
