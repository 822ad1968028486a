"""K2 + K3 for scores that read the page index, one score a page and KV head: a program scores tiles of one KV head.

Specification: `reference.page_scores` and `reference.select_pages`, as of `score_select`, which launches this. The
block table is read one tile ahead: the loads of records then depend on no load of their own iteration, and the compiler
keeps several tiles in flight. The first tile's, and the queries, are read before the length is known. The program of a
request and head that finishes last selects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from vllm_ext.kernels.index_update import page_record
from vllm_ext.kernels.score_select import _count, _write_list, padded_rows

if TYPE_CHECKING:
    from vllm_ext.kernels.score_select import SelectBuffers

TILE = 64
"""Records that a program scores at once."""
PROGRAMS = 264
"""Most programs of a launch, but one for each request and KV head at least: two for each of a Hopper chip's 132 SMs."""
WARPS = 4
"""Of a program."""
STAGES = 3
"""Of the compiler's pipeline over tiles; one less for 256 channels of fp32, whose tiles fill the shared memory."""


@triton.jit
def _query_columns(
    Q, q0, tokens, head, q_tok, q_head, G: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr,
):  # fmt: skip
    """The M * G query rows of one KV head from token q0 on: [DP, ROWS]; zero beyond, and behind the last token."""
    row = tl.arange(0, ROWS)
    rd = tl.arange(0, DP)
    token = q0 + row // G
    ok = (token < tokens) & (row < M * G)
    at = Q + token[None, :] * q_tok + (head * G + row % G)[None, :] * q_head + rd[:, None]
    return tl.load(at, mask=ok[None, :] & (rd < D)[:, None], other=0.0)


@triton.jit(do_not_specialize=["width", "tokens"])
def _score_records(
    Q, K, INDEX, BT, SEQ, START, DENSE, SLOTS, SC, IDS, PAGES, COUNTS, TICKET, STATS,
    scale, radius, dense_limit, capacity, sink, local, np_cap, bt_row, width, tokens,
    q_tok, q_head, k_page, k_head, k_tok, i_page, i_head,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, TILE: tl.constexpr, NB: tl.constexpr, SCORE: tl.constexpr, GROUP: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    worker = tl.program_id(1)
    r = pair // H
    head = pair % H
    table = BT + r * bt_row
    n = tl.load(SEQ + r)
    q0 = tl.load(START + r)
    m = tl.load(START + r + 1) - q0
    prompt = tl.load(DENSE + r)
    page = worker * TILE + tl.arange(0, TILE)
    # Before the length and the first token are known: pages are used where complete, M tokens a request is the rule.
    phys = tl.load(table + page, mask=page < width, other=0)
    q = _query_columns(Q, r * M, tokens, head, q_tok, q_head, G, M, ROWS, D, DP)
    if n == 0 or m == 0:
        return
    real = tl.load(SLOTS + q0) >= 0  # warm-up and capture runs are not counted
    dense = (n <= dense_limit) | (prompt != 0)
    count = tl.where(dense, 0, tl.cdiv(n, P))
    tiles = tl.cdiv(count, TILE)
    active = tl.minimum(tiles, tl.num_programs(1))
    if worker < active:
        if q0 != r * M:
            q = _query_columns(Q, q0, tokens, head, q_tok, q_head, G, M, ROWS, D, DP)
        live = (tl.arange(0, ROWS) < m * G)[None, :]
        rd = tl.arange(0, DP)
        # q . centre + radius |q| . half_range as two products; radius 1 gives max(q, 0) . max + min(q, 0) . min.
        half, reach = 0.5 * q.to(tl.float32), 0.5 * radius * tl.abs(q.to(tl.float32))
        up, down = (half + reach).to(q.dtype), (half - reach).to(q.dtype)
        score = SC + pair.to(tl.int64) * np_cap
        for tile in range(worker, tiles, active):
            page = tile * TILE + tl.arange(0, TILE)
            # a page that this step completes is read anyway, and another program may be writing its record
            complete = page < (n - m) // P
            at = INDEX + phys.to(tl.int64)[:, None] * i_page + head * i_head + rd[None, :]
            ok = complete[:, None] & (rd < D)[None, :]
            low = tl.load(at, mask=ok, other=0.0)
            if SCORE == 0:
                high = tl.load(at + D, mask=ok, other=0.0)
                x = tl.dot(high, up, input_precision="ieee")
                x = tl.dot(low, down, x, input_precision="ieee")
            else:
                x = tl.dot(low, q, input_precision="ieee")
            following = page + active * TILE
            phys = tl.load(table + following, mask=following < count, other=0)
            if GROUP == 0:
                s = tl.max(tl.where(live, x * scale, float("-inf")), 1)
            else:
                s = tl.sum(tl.where(live, x * scale, 0.0), 1) / (m * G)
            tl.store(score + page, tl.where(complete, s, float("-inf")), mask=page < count)
        tl.debug_barrier()  # every thread's scores are written before the ticket says so
        if tl.atomic_add(TICKET + pair, 1, sem="acq_rel") == active - 1:
            tl.store(TICKET + pair, 0)  # ready for the next layer
            _write_list(
                score, table, IDS, PAGES, COUNTS, STATS, pair, n, m, m * G, real, count, capacity, sink, local, np_cap,
                0, P, NB, True,
            )  # fmt: skip
    if dense & (worker == 0):
        tl.store(COUNTS + pair, -1)
        if real:
            _count(STATS, n, n, n, n, False)
    # K1, last: the page that a step completes is always read, no score of this step matters.
    if KIND >= 0:  # noqa: SIM102 (a constant: the branch is not compiled otherwise)
        if worker == 0:
            for t in range(0, m):
                slot = tl.load(SLOTS + q0 + t).to(tl.int64)
                if slot >= 0 and slot % P == P - 1:
                    page_record(K, INDEX, slot // P, head, k_page, k_head, k_tok, i_page, i_head, KIND, P, D)


def score_records(
    q: Tensor, k_cache: Tensor, index: Tensor, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor,
    always_dense: Tensor, slot_mapping: Tensor, buffers: SelectBuffers, *, max_query_len: int, scale: float,
    radius: float, dense_limit: int, capacity: int, sink: int, local: int, score: int, group: int, kind: int,
) -> None:  # fmt: skip
    """Fill the buffers as `score_select` does; `score`, `group`, `kind` are its compile-time numbers.

    Scores `bound` and `dot`, groups `max` and `mean`: one score a page and KV head.
    """
    pairs, heads = seq_lens.shape[0] * k_cache.shape[1], k_cache.shape[1]
    g, d = q.shape[1] // heads, q.shape[2]
    np_cap = buffers.scores.shape[3]
    workers = max(1, min(triton.cdiv(np_cap, TILE), PROGRAMS // pairs))
    padded = triton.next_power_of_2(d)
    stages = STAGES if padded * q.element_size() <= 512 else STAGES - 1
    _score_records[(pairs, workers)](
        q, k_cache, index, block_table, seq_lens, query_start_loc, always_dense, slot_mapping,
        buffers.scores, buffers.ids, buffers.pages, buffers.counts, buffers.ticket, buffers.stats,
        scale, radius, dense_limit, capacity, sink, local, np_cap, block_table.stride(0), block_table.shape[1],
        q.shape[0], q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), index.stride(0),
        index.stride(1),
        H=heads, G=g, M=max_query_len, ROWS=padded_rows(max_query_len, g), D=d, DP=padded,
        P=k_cache.shape[2], TILE=TILE, NB=triton.next_power_of_2(max(np_cap, capacity)), SCORE=score, GROUP=group,
        KIND=kind, num_warps=WARPS, num_stages=stages,
    )  # fmt: skip
