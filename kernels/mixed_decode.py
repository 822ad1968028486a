"""One attention launch for heads that read every page and heads that read a list: equal work for every program.

Specification: `step` and `attend` of `reference_lychee`. The pages that all (request, KV head) pairs of the step read
are laid end to end and cut into as many equal pieces as there are programs, on the device: a dense pair of 2,048 pages
gets thirty-two times the programs of a list of 64. While a retrieval head's keys pass by, the largest logit of its mean
query in each page is kept; whichever program finishes such a pair chooses its list for the layers behind. Lists of
first and last pages (`recent`) are worked out from the length: nothing is scored, kept or handed on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ext.kernels.score_select import _select, padded_rows, query_rows
from vllm_ext.kernels.sparse_decode import stages_for

PROGRAMS = 132
"""One deeply pipelined program for each SM of an H100."""


@triton.jit
def _piece(
    q, live, K, V, PAGES, SC, lo, hi, ahead, sink, n, m, scale, choosing, k_page, k_head, k_tok, v_page, v_head, v_tok,
    head, G: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SCORED: tl.constexpr, RECENT: tl.constexpr,
):  # fmt: skip
    """Online softmax over entries lo .. hi of a pair, base 2: (numerator [ROWS, DP], maximum, denominator [ROWS])."""
    rp = tl.arange(0, P)
    rd = tl.arange(0, DP)
    limit = n - m + 1 + tl.arange(0, ROWS) // G
    top = tl.full([ROWS], -1e30, tl.float32)
    den = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    KH = K + head * k_head
    VH = V + head * v_head
    for j in range(lo, hi):
        entry = j
        if RECENT:
            entry = j + tl.where(j >= sink, ahead, 0)
        phys = tl.load(PAGES + entry).to(tl.int64)
        at = KH + phys * k_page + rp[None, :] * k_tok + rd[:, None]
        if D == DP:
            keys = tl.load(at)
        else:
            keys = tl.load(at, mask=(rd < D)[:, None], other=0.0)
        x = tl.dot(q, keys, input_precision="ieee") * (scale * 1.4426950408889634)
        position = (ahead + j) * P + rp
        if SCORED:
            mean = tl.sum(tl.where(live[:, None], x, 0.0), 0) / (m * G)
            best = tl.max(tl.where(position < n, mean, float("-inf")), 0)
            tl.store(SC + j, best, mask=choosing)
        x = tl.where(position[None, :] < limit[:, None], x, float("-inf"))
        new = tl.maximum(top, tl.max(x, 1))
        weight = tl.exp2(x - new[:, None])
        fade = tl.exp2(top - new)
        at = VH + phys * v_page + rp[:, None] * v_tok + rd[None, :]
        if D == DP:
            values = tl.load(at)
        else:
            values = tl.load(at, mask=(rd < D)[None, :], other=0.0)
        acc = tl.dot(weight.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
        den = den * fade + tl.sum(weight, 1)
        top = new
    return acc, top, den


@triton.jit
def _merge_pieces(PO, PL, pieces, live_rows, MR: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr):
    """Merge partials [piece, MR, DP] with base-2 LSE [piece, MR], in order: [MR, DP]."""
    row = tl.arange(0, MR)
    rd = tl.arange(0, DP)
    rc = tl.arange(0, CHUNK)
    top = tl.full([MR], -1e30, tl.float32)
    den = tl.zeros([MR], tl.float32)
    acc = tl.zeros([MR, DP], tl.float32)
    for s in range(0, pieces, CHUNK):
        here = (s + rc < pieces)[:, None] & (row < live_rows)[None, :]
        lse = tl.load(PL + (s + rc)[:, None] * MR + row[None, :], mask=here, other=float("-inf"), cache_modifier=".cg")
        at = PO + ((s + rc)[:, None, None] * MR + row[None, :, None]) * DP + rd[None, None, :]
        out = tl.load(at, mask=here[:, :, None], other=0.0, cache_modifier=".cg")
        new = tl.maximum(top, tl.max(lse, 0))
        weight = tl.exp2(lse - new[None, :])
        fade = tl.exp2(top - new)
        acc = acc * fade[:, None] + tl.sum(out * weight[:, :, None], 0)
        den = den * fade + tl.sum(weight, 0)
        top = new
    return acc / tl.where(den > 0, den, 1.0)[:, None]


@triton.jit
def _write(
    OUT, out, q0, head, o_tok, o_head, live_rows, G: tl.constexpr, MR: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):
    """Store [MR, DP] as the rows of one KV head."""
    row = tl.arange(0, MR)
    rd = tl.arange(0, DP)
    at = OUT + (q0 + row // G)[:, None] * o_tok + (head * G + row % G)[:, None] * o_head + rd[None, :]
    tl.store(at, out.to(OUT.dtype.element_ty), mask=(row < live_rows)[:, None] & (rd < D)[None, :])


@triton.jit
def _count(STATS, read, n, pages, is_dense):
    """Add one request and head to the counters (order of `vllm_ext.metrics.NAMES`)."""
    tl.atomic_add(STATS, read.to(tl.int64), sem="relaxed")
    tl.atomic_add(STATS + 1, n.to(tl.int64), sem="relaxed")
    if is_dense:
        tl.atomic_add(STATS + 5, 1, sem="relaxed")
    else:
        tl.atomic_add(STATS + 3, pages.to(tl.int64), sem="relaxed")
        tl.atomic_add(STATS + 4, 1, sem="relaxed")


@triton.jit(do_not_specialize=["pairs"])
def _mixed_decode(
    Q, K, V, BT, SEQ, START, DENSE, SLOTS, ROLE, SC, IDS, PAGES, COUNTS, OUT, PO, PL, TICKET, STATS,
    scale, pairs, dense_limit, capacity, sink, local, np_cap, bt_row, q_tok, q_head, o_tok, o_head,
    k_page, k_head, k_tok, v_page, v_head, v_tok,
    H: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, MR: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, CHUNK: tl.constexpr, SCORED: tl.constexpr,
    RECENT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    every = tl.arange(0, PB)
    known = every < pairs
    request = every // H
    lens = tl.load(SEQ + request, mask=known, other=0)
    begin = tl.load(START + request, mask=known, other=0)
    alive = known & (lens > 0) & (tl.load(START + request + 1, mask=known, other=0) > begin)
    whole = (lens <= dense_limit) | (tl.load(DENSE + request, mask=known, other=0) != 0)
    whole = whole | (tl.load(ROLE + every % H, mask=known, other=0) != 0)
    if RECENT:
        listed = tl.minimum(tl.cdiv(lens, P), capacity)
    else:
        listed = tl.load(COUNTS + every, mask=known & (whole == 0), other=0)
    work = tl.where(alive, tl.where(whole, tl.cdiv(lens, P), listed), 0)
    ends = tl.cumsum(work, 0)
    total = tl.sum(work, 0)
    share = tl.maximum(1, tl.cdiv(total, tl.num_programs(0)))
    at = pid * share
    stop = tl.minimum(at + share, total)
    while at < stop:
        pair = tl.sum((ends <= at).to(tl.int32), 0)
        end = tl.sum(tl.where(every == pair, ends, 0), 0)
        count = tl.sum(tl.where(every == pair, work, 0), 0)
        start = end - count
        r = pair // H
        head = pair % H
        n = tl.load(SEQ + r)
        q0 = tl.load(START + r)
        m = tl.load(START + r + 1) - q0
        is_dense = (n <= dense_limit) | (tl.load(DENSE + r) != 0)
        choosing = (is_dense == 0) & (tl.load(ROLE + head) != 0)
        is_list = (is_dense == 0) & (choosing == 0)
        pages = tl.cdiv(n, P)
        SCP = SC + pair.to(tl.int64) * np_cap
        first = pair.to(tl.int64) * capacity
        table = BT + r.to(tl.int64) * bt_row
        if not RECENT:  # noqa: SIM102 (a constant: the branch is not compiled otherwise)
            if is_list:
                table = PAGES + first
        if (at == start) & (tl.load(SLOTS + q0) >= 0):  # warm-up and capture runs are not counted
            _count(STATS, count * P - (pages * P - n), n, count, is_dense)
        q, live = query_rows(Q, q0, m, head, q_tok, q_head, G, ROWS, D, DP)
        lo = at - start
        hi = tl.minimum(stop, end) - start
        acc, top, den = _piece(
            q, live, K, V, table, SCP, lo, hi, pages - count, sink, n, m, scale, choosing,
            k_page, k_head, k_tok, v_page, v_head, v_tok, head, G, ROWS, P, D, DP, SCORED, RECENT,
        )  # fmt: skip
        safe = tl.where(den > 0, den, 1.0)
        out = acc / safe[:, None]
        before = start // share
        pieces = (end - 1) // share - before + 1
        done = pieces == 1
        if pieces == 1:
            _write(OUT, out, q0, head, o_tok, o_head, m * G, G, ROWS, D, DP)
        else:
            row = tl.arange(0, ROWS)
            rd = tl.arange(0, DP)
            part = (pid + pair).to(tl.int64)  # pieces lie on a staircase of programs and pairs: no two share a step
            lse = tl.where(den > 0, top + tl.log2(safe), float("-inf"))
            tl.store(PO + (part * MR + row[:, None]) * DP + rd[None, :], out, mask=live[:, None])
            tl.store(PL + part * MR + row, lse, mask=live)
            tl.debug_barrier()  # every thread's partial is written before the ticket says so
            done = tl.atomic_add(TICKET + pair, 1, sem="acq_rel") == pieces - 1
            if done:
                tl.store(TICKET + pair, 0)
                part = (before + pair).to(tl.int64)
                merged = _merge_pieces(PO + part * MR * DP, PL + part * MR, pieces, m * G, MR, DP, CHUNK)
                _write(OUT, merged, q0, head, o_tok, o_head, m * G, G, MR, D, DP)
        if SCORED:  # noqa: SIM102 (a constant: the branch is not compiled otherwise)
            if done & choosing:
                tl.debug_barrier()  # this program's own scores
                last = tl.maximum(0, tl.minimum(pages - local, (n - m) // P))
                _select(
                    SCP, BT + r.to(tl.int64) * bt_row, IDS + first, PAGES + first, COUNTS + pair, pages, m * G,
                    tl.minimum(sink, pages), last, capacity, np_cap, 0, NB,
                )  # fmt: skip
        at = tl.minimum(stop, end)


@dataclass
class MixedBuffers:
    """Lists that are handed from layer to layer, page scores and partials, allocated once per engine."""

    scores: Tensor
    ids: Tensor
    pages: Tensor
    counts: Tensor
    out: Tensor
    lse: Tensor
    ticket: Tensor
    stats: Tensor
    programs: int

    @classmethod
    def allocate(
        cls, requests: int, heads: int, rows: int, head_size: int, pages: int, capacity: int, stats: Tensor,
        programs: int = PROGRAMS,
    ) -> MixedBuffers:  # fmt: skip
        """Room for `requests` requests of `pages` pages, `rows` query rows a KV head; on the device of `stats`."""
        mr, dp = triton.next_power_of_2(rows), triton.next_power_of_2(head_size)
        parts = programs + requests * heads

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=stats.device)

        return cls(
            zeros(requests, heads, pages, dtype=torch.float32), zeros(requests, heads, capacity),
            zeros(requests, heads, capacity), zeros(requests, heads), zeros(parts * mr * dp, dtype=torch.float32),
            zeros(parts * mr, dtype=torch.float32), zeros(requests, heads), stats, programs,
        )  # fmt: skip


def mixed_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor,
    always_dense: Tensor, slot_mapping: Tensor, role: Tensor, out: Tensor, buffers: MixedBuffers, *,
    max_query_len: int, scale: float, dense_limit: int, capacity: int, sink: int, local: int, choose: bool,
    recent: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of one layer into `out` [T, Hq, D], and new lists for its retrieval heads; shapes as in `reference`.

    Args:
        role: [H] int32, nonzero = a retrieval head; the others read the lists in `buffers`.
        choose: whether retrieval heads write lists, for a layer that has one (a constant of the captured graph).
        recent: the other heads read the first `sink` and the last pages, `capacity` in all, and no lists in `buffers`.
        max_query_len: most query tokens of a request; a constant of the captured graph.
    """
    requests, heads = seq_lens.shape[0], k_cache.shape[1]
    g, d, page = q.shape[1] // heads, q.shape[2], k_cache.shape[2]
    rows = padded_rows(max_query_len, g)
    mr, dp = triton.next_power_of_2(max_query_len * g), triton.next_power_of_2(d)
    np_cap = buffers.scores.shape[2]
    _mixed_decode[(buffers.programs,)](
        q, k_cache, v_cache, block_table, seq_lens, query_start_loc, always_dense, slot_mapping, role,
        buffers.scores, buffers.ids, buffers.pages, buffers.counts, out, buffers.out, buffers.lse, buffers.ticket,
        buffers.stats, scale, requests * heads, dense_limit, capacity, sink, local, np_cap, block_table.stride(0),
        q.stride(0), q.stride(1), out.stride(0), out.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        H=heads, G=g, ROWS=rows, MR=mr, D=d, DP=dp, P=page, PB=triton.next_power_of_2(requests * heads),
        NB=triton.next_power_of_2(max(np_cap, capacity)), CHUNK=max(1, 4096 // (mr * dp)), SCORED=choose,
        RECENT=recent, num_warps=4, num_stages=stages_for(page, dp, rows),
    )  # fmt: skip
    return out
