"""K4 + K5 in one launch: split-KV paged attention over page lists, merged by the last split of a request and head.

Specification: `reference.sparse_attention` and `reference.merge`. A count of -1 reads every page of the request, so
dense and sparse requests share a launch. Partials are merged in split order, whichever split comes last: the result
does not depend on timing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ext.kernels.score_select import padded_rows, query_rows

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Few values: each is a constant of its own compiled kernel."""
MAX_SPLITS = SPLITS[-1]


@triton.jit
def _attend(
    q, K, V, PAGES, LOGW, MASKS, lo, hi, ahead, is_list, n, m, scale,
    k_page, k_head, k_tok, v_page, v_head, v_tok, head,
    G: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    WEIGHTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over list entries lo .. hi: (numerator [ROWS, DP], maximum [ROWS], denominator [ROWS]), base 2."""
    rp = tl.arange(0, P)
    rd = tl.arange(0, DP)
    row = tl.arange(0, ROWS)
    limit = n - m + 1 + row // G
    top = tl.full([ROWS], -1e30, tl.float32)
    den = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    KH = K + head * k_head
    VH = V + head * v_head
    for j in range(lo, hi):
        phys = tl.load(PAGES + j).to(tl.int64)
        at = KH + phys * k_page + rp[None, :] * k_tok + rd[:, None]
        if D == DP:
            keys = tl.load(at)
        else:
            keys = tl.load(at, mask=(rd < D)[:, None], other=0.0)
        x = tl.dot(q, keys, input_precision="ieee") * (scale * 1.4426950408889634)
        if WEIGHTED:
            x += tl.load(LOGW + j, mask=is_list, other=0.0) * 1.4426950408889634
        # The list ends with the request's last pages. An entry before them is no later than `ahead + j`, hence visible.
        seen = ((ahead + j) * P + rp)[None, :] < limit[:, None]
        if MASKED:
            bits = tl.load(MASKS + j, mask=is_list, other=-1)
            seen = seen & (((bits >> (row // G)) & 1) == 1)[:, None]
        x = tl.where(seen, x, float("-inf"))
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
def _merge_splits(PO, PL, splits, live_rows, MR: tl.constexpr, DP: tl.constexpr, SB: tl.constexpr, CHUNK: tl.constexpr):
    """Merge `splits` partials [split, MR, DP] with LSE [split, MR] (base e): (output [MR, DP], LSE [MR])."""
    row = tl.arange(0, MR)
    rd = tl.arange(0, DP)
    rs = tl.arange(0, SB)
    ok = (rs < splits)[:, None] & (row < live_rows)[None, :]
    lse = tl.load(PL + rs[:, None] * MR + row[None, :], mask=ok, other=float("-inf"), cache_modifier=".cg")
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(lse - top[None, :]), 0)
    acc = tl.zeros([MR, DP], tl.float32)
    rc = tl.arange(0, CHUNK)
    for s in range(0, splits, CHUNK):
        here = (s + rc < splits)[:, None] & (row < live_rows)[None, :]
        part = tl.load(PL + (s + rc)[:, None] * MR + row[None, :], mask=here, other=float("-inf"), cache_modifier=".cg")
        weight = tl.exp(part - top[None, :])
        at = PO + ((s + rc)[:, None, None] * MR + row[None, :, None]) * DP + rd[None, None, :]
        out = tl.load(at, mask=here[:, :, None], other=0.0, cache_modifier=".cg")
        acc += tl.sum(out * weight[:, :, None], 0)
    safe = tl.where(total > 0, total, 1.0)
    return acc / safe[:, None], tl.where(total > 0, top + tl.log(safe), float("-inf"))


@triton.jit
def _sparse_decode(
    Q, K, V, BT, SEQ, START, PAGES, COUNTS, LOGW, MASKS, OUT, LSE, PO, PL, TICKET,
    scale, capacity, bt_row, q_tok, q_head, o_tok, o_head,
    k_page, k_head, k_tok, v_page, v_head, v_tok,
    H: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, MR: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, SPLITS: tl.constexpr, SB: tl.constexpr, CHUNK: tl.constexpr,
    WEIGHTED: tl.constexpr, MASKED: tl.constexpr, WANT_LSE: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    split = tl.program_id(1)
    r = pair // H
    head = pair % H
    n = tl.load(SEQ + r)
    q0 = tl.load(START + r)
    m = tl.load(START + r + 1) - q0
    count = tl.load(COUNTS + pair)
    if (n == 0) | (m == 0):
        return
    is_list = count >= 0
    total = tl.cdiv(n, P)
    count = tl.where(is_list, count, total)
    share = tl.maximum(1, tl.cdiv(count, SPLITS))
    active = tl.maximum(1, tl.cdiv(count, share))
    if split >= active:
        return
    lo = split * share
    hi = tl.minimum(lo + share, count)
    q, live = query_rows(Q, q0, m, head, q_tok, q_head, G, ROWS, D, DP)
    first = pair.to(tl.int64) * capacity
    if is_list:
        pages = PAGES + first
    else:
        pages = BT + r.to(tl.int64) * bt_row
    acc, top, den = _attend(
        q, K, V, pages, LOGW + first, MASKS + first, lo, hi, total - count, is_list, n, m, scale,
        k_page, k_head, k_tok, v_page, v_head, v_tok, head, G, ROWS, P, D, DP, WEIGHTED, MASKED,
    )  # fmt: skip
    safe = tl.where(den > 0, den, 1.0)
    out = acc / safe[:, None]
    lse = tl.where(den > 0, (top + tl.log2(safe)) * 0.6931471805599453, float("-inf"))
    row = tl.arange(0, ROWS)
    rd = tl.arange(0, DP)
    if active == 1:
        token = q0 + row // G
        hq = head * G + row % G
        at = OUT + token[:, None] * o_tok + hq[:, None] * o_head + rd[None, :]
        tl.store(at, out.to(OUT.dtype.element_ty), mask=live[:, None] & (rd < D)[None, :])
        if WANT_LSE:
            tl.store(LSE + token * (H * G) + hq, lse, mask=live)
        return
    part = pair.to(tl.int64) * SPLITS + split
    tl.store(PO + (part * MR + row[:, None]) * DP + rd[None, :], out, mask=live[:, None])
    tl.store(PL + part * MR + row, lse, mask=live)
    tl.debug_barrier()  # every thread's partial is written before the ticket says so
    if tl.atomic_add(TICKET + pair, 1, sem="acq_rel") == active - 1:
        tl.store(TICKET + pair, 0)
        base = pair.to(tl.int64) * SPLITS * MR
        merged, merged_lse = _merge_splits(PO + base * DP, PL + base, active, m * G, MR, DP, SB, CHUNK)
        mrow = tl.arange(0, MR)
        token = q0 + mrow // G
        hq = head * G + mrow % G
        alive = mrow < m * G
        at = OUT + token[:, None] * o_tok + hq[:, None] * o_head + rd[None, :]
        tl.store(at, merged.to(OUT.dtype.element_ty), mask=alive[:, None] & (rd < D)[None, :])
        if WANT_LSE:
            tl.store(LSE + token * (H * G) + hq, merged_lse, mask=alive)


def splits_for(pairs: int, programs: int = 132) -> int:
    """Splits of one request and head: about one deeply pipelined program for each of the 132 SMs of an H100."""
    return min(SPLITS, key=lambda n: abs(math.log(n * max(1, pairs) / programs)))


def stages_for(page: int, dp: int, rows: int) -> int:
    """Depth of the pipeline: five pages in flight, or as many as fit the 227 KiB of shared memory of an H100."""
    return 5 if max(page, rows) * dp <= 16384 else 3


@dataclass
class DecodeBuffers:
    """Partials of `sparse_decode`, allocated once per engine."""

    out: Tensor
    lse: Tensor
    ticket: Tensor

    @classmethod
    def allocate(
        cls, requests: int, heads: int, rows: int, head_size: int, device: torch.device | str
    ) -> DecodeBuffers:
        """Room for any number of requests up to `requests`, `rows` query rows a KV head."""
        mr, dp = triton.next_power_of_2(rows), triton.next_power_of_2(head_size)
        parts = max(r * heads * splits_for(r * heads) for r in range(1, requests + 1))
        return cls(
            torch.zeros(parts * mr * dp, dtype=torch.float32, device=device),
            torch.zeros(parts * mr, dtype=torch.float32, device=device),
            torch.zeros(requests * heads, dtype=torch.int32, device=device),
        )


def sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    pages: Tensor,
    counts: Tensor,
    out: Tensor,
    buffers: DecodeBuffers,
    *,
    max_query_len: int,
    scale: float,
    log_weight: Tensor | None = None,
    row_mask: Tensor | None = None,
    lse: Tensor | None = None,
    splits: int | None = None,
    num_warps: int = 4,
    num_stages: int | None = None,
) -> Tensor:
    """Attention of a decode batch over its page lists, written into `out` [T, Hq, D]; shapes as in `reference`.

    Args:
        pages, counts: [R, H, C], [R, H] int32, physical pages as `score_select` leaves them: the list of a request ends
            with every page that holds one of its query tokens, in order. counts = -1 reads every page.
        log_weight: [R, H, C] fp32 added to the logits of an entry; row_mask: [R, H, C] int32, bit t = token t reads it.
        lse: [T, Hq] fp32, filled with the log-sum-exp if given.
        max_query_len: most query tokens of a request; splits: programs a request and KV head (a constant of the graph).

    Rows of padded requests are left as they are.
    """
    requests, heads = seq_lens.shape[0], k_cache.shape[1]
    g, d = q.shape[1] // heads, q.shape[2]
    rows = padded_rows(max_query_len, g)
    mr, dp = triton.next_power_of_2(max_query_len * g), triton.next_power_of_2(d)
    splits = splits_for(requests * heads) if splits is None else splits
    sb, dummy = triton.next_power_of_2(splits), buffers.lse
    _sparse_decode[(requests * heads, splits)](
        q, k_cache, v_cache, block_table, seq_lens, query_start_loc, pages, counts,
        dummy if log_weight is None else log_weight, counts if row_mask is None else row_mask,
        out, dummy if lse is None else lse, buffers.out, buffers.lse, buffers.ticket,
        scale, pages.shape[2], block_table.stride(0), q.stride(0), q.stride(1), out.stride(0), out.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        H=heads, G=g, ROWS=rows, MR=mr, D=d, DP=dp, P=k_cache.shape[2],
        SPLITS=splits, SB=sb, CHUNK=min(sb, max(1, 4096 // (mr * dp))),
        WEIGHTED=log_weight is not None, MASKED=row_mask is not None, WANT_LSE=lse is not None,
        num_warps=num_warps, num_stages=num_stages or stages_for(k_cache.shape[2], dp, rows),
    )  # fmt: skip
    return out
