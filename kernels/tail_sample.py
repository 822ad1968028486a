"""A uniform sample of the keys outside the page lists, in two launches: pilot and budget, then the rest and the merge.

Specification: `reference_sampling.sample_tail`. No list of draws is stored: draw i of a request and KV head is a hashed
permutation of the tail, worked out where it is read, so any number of draws fits a captured graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ext.kernels.reference_sampling import GUARANTEES, ROUNDS, Target
from vllm_ext.kernels.score_select import padded_rows, query_rows
from vllm_ext.kernels.sparse_decode import MAX_SPLITS, _merge_splits, splits_for

DRAWS = 64
"""Keys gathered at once."""
_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _stream(seed, position, layer, head):
    """`reference_sampling.stream`."""
    x = _mix(seed.to(tl.uint32) * 31 + position.to(tl.uint32) + 1)
    x = _mix(x * 31 + layer.to(tl.uint32) + 1)
    return _mix(x * 31 + head.to(tl.uint32) + 1)


@triton.jit
def _permute(x, size, low, high, key):
    """`reference_sampling.permutation` of x [B] below `size`, all uint32; `low` + `high` bits."""
    low_mask = (tl.full([], 1, tl.uint32) << low) - 1
    high_mask = (tl.full([], 1, tl.uint32) << high) - 1
    outside = x < size
    while tl.max(outside.to(tl.int32), 0) > 0:
        left = x >> low
        right = x & low_mask
        for r in tl.static_range(_ROUNDS):
            left = left ^ (_mix(right + key + ((2 * r * 0x9E3779B9) & 0xFFFFFFFF)) & high_mask)
            right = right ^ (_mix(left + key + (((2 * r + 1) * 0x9E3779B9) & 0xFFFFFFFF)) & low_mask)
        x = tl.where(outside, (left << low) | right, x)
        outside = x >= size
    return x


@triton.jit
def _tail_keys(draw, IDS, count, P: tl.constexpr, LOG: tl.constexpr):
    """Logical page and offset of tail keys `draw` [B] int32: the page of rank r skips the listed ones before it."""
    rank = draw // P
    low = draw * 0
    high = low + count
    for _ in tl.static_range(LOG):  # entries whose id minus place is at most the rank lie before the page
        middle = (low + high) // 2
        open_ = low < high
        before = open_ & (tl.load(IDS + middle, mask=open_, other=0) - middle <= rank)
        low = tl.where(before, middle + 1, low)
        high = tl.where(open_ & (before == 0), middle, high)
    return rank + low, draw % P


@triton.jit
def _gather(
    q, K, V, BT, IDS, count, begin, end, tile0, tile1, tail, key, scale, head,
    k_page, k_head, k_tok, v_page, v_head, v_tok,
    ROWS: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DRAWS: tl.constexpr, LOG: tl.constexpr,
    MOMENTS: tl.constexpr,
):  # fmt: skip
    """Attention over draws begin .. end, tiles tile0 .. tile1 of them: numerator, maximum (base 2), denominator, and
    with MOMENTS the sums of w^2 and w^2 |v|^2."""
    rd = tl.arange(0, DP)
    bits = tail * 0 + 2
    while (1 << bits) < tail:
        bits += 1
    high = (bits // 2).to(tl.uint32)
    low = bits.to(tl.uint32) - high
    top = tl.full([ROWS], -1e30, tl.float32)
    den = tl.zeros([ROWS], tl.float32)
    s2 = tl.zeros([ROWS], tl.float32)
    n2 = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    for t in range(tile0, tile1):
        i = begin + t * DRAWS + tl.arange(0, DRAWS)
        live = i < end
        draw = _permute(tl.where(live, i, 0).to(tl.uint32), tail.to(tl.uint32), low, high, key).to(tl.int32)
        page, offset = _tail_keys(draw, IDS, count, P, LOG)
        phys = tl.load(BT + page, mask=live, other=0).to(tl.int64)
        ok = rd < D
        at = K + head * k_head + phys * k_page + offset * k_tok
        keys = tl.load(at[None, :] + rd[:, None], mask=live[None, :] & ok[:, None], other=0.0)
        at = V + head * v_head + phys * v_page + offset * v_tok
        values = tl.load(at[:, None] + rd[None, :], mask=live[:, None] & ok[None, :], other=0.0)
        x = tl.dot(q, keys, input_precision="ieee") * (scale * 1.4426950408889634)
        x = tl.where(live[None, :], x, float("-inf"))
        new = tl.maximum(top, tl.max(x, 1))
        w = tl.exp2(x - new[:, None])
        fade = tl.exp2(top - new)
        acc = tl.dot(w.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
        den = den * fade + tl.sum(w, 1)
        if MOMENTS:
            square = tl.sum(values.to(tl.float32) * values.to(tl.float32), 1)
            s2 = s2 * fade * fade + tl.sum(w * w, 1)
            n2 = n2 * fade * fade + tl.sum(w * w * square[None, :], 1)
        top = new
    return acc, top, den, s2, n2


@triton.jit
def _store_partial(PO, PL, acc, top, den, part, live, ROWS: tl.constexpr, MR: tl.constexpr, DP: tl.constexpr):
    """Store one normalised partial and its log-sum-exp (base e) at slot `part`; returns the safe denominator."""
    row = tl.arange(0, ROWS)
    safe = tl.where(den > 0, den, 1.0)
    lse = tl.where(den > 0, (top + tl.log2(safe)) * 0.6931471805599453, float("-inf"))
    at = PO + (part * MR + row[:, None]) * DP + tl.arange(0, DP)[None, :]
    tl.store(at, acc / safe[:, None], mask=live[:, None])
    tl.store(PL + part * MR + row, lse, mask=live)
    return safe


@triton.jit
def _request(SEQ, START, COUNTS, pair, H: tl.constexpr, P: tl.constexpr):
    """(request, head, keys, first token, tokens, listed pages, tail keys) of a pair; no tail where all is read."""
    r = pair // H
    n = tl.load(SEQ + r)
    q0 = tl.load(START + r)
    m = tl.load(START + r + 1) - q0
    count = tl.load(COUNTS + pair)
    tail = tl.where((n > 0) & (m > 0) & (count >= 0), (tl.cdiv(n, P) - count) * P, 0)
    return r, pair % H, n, q0, m, count, tail


@triton.jit
def _pilot_draws(tail, pilot, rate):
    return tl.minimum(tail, tl.maximum(pilot, tl.ceil(rate * tail.to(tl.float32)).to(tl.int32)))


@triton.jit(do_not_specialize=["seed", "layer", "first_head"])
def _pilot(
    Q, K, V, BT, SEQ, START, SLOTS, IDS, COUNTS, OUT, LSE, PO, PL, PM, B, TICKET, STATS,
    scale, seed, layer, first_head, pilot, rate, factor, cap, capacity, bt_row, q_tok, q_head, o_tok, o_head,
    k_page, k_head, k_tok, v_page, v_head, v_tok,
    H: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, MR: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, SPLITS: tl.constexpr, SB: tl.constexpr, CHUNK: tl.constexpr, DRAWS: tl.constexpr,
    LOG: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    split = tl.program_id(1)
    r, head, n, q0, m, count, tail = _request(SEQ, START, COUNTS, pair, H, P)
    if tail == 0:
        if split == 0:
            tl.store(B + pair, 0)
        return
    b0 = _pilot_draws(tail, pilot, rate)
    tiles = tl.cdiv(b0, DRAWS)
    share = tl.cdiv(tiles, SPLITS)
    active = tl.cdiv(tiles, share)
    if split >= active:
        return
    q, live = query_rows(Q, q0, m, head, q_tok, q_head, G, ROWS, D, DP)
    ids = IDS + pair.to(tl.int64) * capacity
    acc, top, den, s2, n2 = _gather(
        q, K, V, BT + r.to(tl.int64) * bt_row, ids, count, 0, b0, split * share,
        tl.minimum(tiles, (split + 1) * share), tail, _stream(seed, n - m, layer, first_head + head), scale, head,
        k_page, k_head, k_tok, v_page, v_head, v_tok, ROWS, P, D, DP, DRAWS, LOG, True,
    )  # fmt: skip
    base = pair.to(tl.int64) * (SPLITS + 1)
    safe = _store_partial(PO, PL, acc, top, den, base + 1 + split, live, ROWS, MR, DP)
    row = tl.arange(0, ROWS)
    at = PM + ((base + 1 + split) * 2) * MR + row
    tl.store(at, s2 / (safe * safe), mask=live)
    tl.store(at + MR, n2 / (safe * safe), mask=live)
    tl.debug_barrier()
    if tl.atomic_add(TICKET + pair, 1, sem="acq_rel") == active - 1:
        tl.store(TICKET + pair, 0)
        PO += base * MR * DP
        PL += base * MR
        PM += base * 2 * MR
        out, lse = _merge_splits(PO + MR * DP, PL + MR, active, m * G, MR, DP, SB, CHUNK)
        mrow = tl.arange(0, MR)
        rd = tl.arange(0, DP)
        alive = mrow < m * G
        tl.store(PO + mrow[:, None] * DP + rd[None, :], out, mask=alive[:, None])
        tl.store(PL + mrow, lse, mask=alive)
        rs = tl.arange(0, SB)
        ok = (rs < active)[:, None] & alive[None, :]
        level_at = PL + (1 + rs)[:, None] * MR + mrow[None, :]
        weight = tl.exp(2 * (tl.load(level_at, mask=ok, other=float("-inf"), cache_modifier=".cg") - lse[None, :]))
        moments = PM + (1 + rs)[:, None] * 2 * MR + mrow[None, :]
        squares = tl.sum(tl.where(ok, weight * tl.load(moments, mask=ok, other=0.0, cache_modifier=".cg"), 0.0), 0)
        moments += MR
        norms = tl.sum(tl.where(ok, weight * tl.load(moments, mask=ok, other=0.0, cache_modifier=".cg"), 0.0), 0)
        token = q0 + mrow // G
        hq = head * G + mrow % G
        level = tl.load(LSE + token * (H * G) + hq, mask=alive, other=0.0)
        size = tail.to(tl.float32)
        drawn = b0.to(tl.float32)
        part = tl.sigmoid(tl.log(size / drawn) + lse - level)  # the tail's estimated share of the denominator
        spread = drawn / tl.maximum(drawn - 1, 1.0)
        need = part * part * spread * (drawn * squares - 1)
        if OUTPUT:
            listed_at = OUT + token[:, None] * o_tok + hq[:, None] * o_head + rd[None, :]
            listed = tl.load(listed_at, mask=alive[:, None] & (rd < D)[None, :], other=0.0).to(tl.float32)
            both = listed + part[:, None] * (out - listed)
            trace = spread * (drawn * norms - tl.sum(out * out, 1))
            need = tl.maximum(need, part * part * trace / tl.maximum(tl.sum(both * both, 1), 1e-30))
        need = tl.max(tl.where(alive, need, 0.0), 0) * factor * factor
        b = tl.ceil(tl.maximum(need, 0.0) / (1 + need / size)).to(tl.int32)
        b = tl.where(b0 >= tail, tail, tl.minimum(tl.maximum(b, b0), tail))
        final = tl.minimum(b, tl.maximum(b0, (cap * size).to(tl.int32)))
        tl.store(B + pair, final)
        if tl.load(SLOTS + q0) >= 0:
            tl.atomic_add(STATS, final.to(tl.int64), sem="relaxed")
            tl.atomic_add(STATS + 7, (final < b).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["seed", "layer", "first_head"])
def _rest(
    Q, K, V, BT, SEQ, START, IDS, COUNTS, OUT, LSE, PO, PL, B, TICKET,
    scale, seed, layer, first_head, pilot, rate, capacity, bt_row, q_tok, q_head, o_tok, o_head,
    k_page, k_head, k_tok, v_page, v_head, v_tok,
    H: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, MR: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, SPLITS: tl.constexpr, SB: tl.constexpr, CHUNK: tl.constexpr, DRAWS: tl.constexpr,
    LOG: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    split = tl.program_id(1)
    r, head, n, q0, m, count, tail = _request(SEQ, START, COUNTS, pair, H, P)
    if tail == 0:
        return
    b = tl.load(B + pair)
    b0 = tl.minimum(b, _pilot_draws(tail, pilot, rate))
    tiles = tl.cdiv(b - b0, DRAWS)
    share = tl.maximum(1, tl.cdiv(tiles, SPLITS))
    active = tl.maximum(1, tl.cdiv(tiles, share))
    if split >= active:
        return
    q, live = query_rows(Q, q0, m, head, q_tok, q_head, G, ROWS, D, DP)
    acc, top, den, _, _ = _gather(
        q, K, V, BT + r.to(tl.int64) * bt_row, IDS + pair.to(tl.int64) * capacity, count, b0, b, split * share,
        tl.minimum(tiles, (split + 1) * share), tail, _stream(seed, n - m, layer, first_head + head), scale, head,
        k_page, k_head, k_tok, v_page, v_head, v_tok, ROWS, P, D, DP, DRAWS, LOG, False,
    )  # fmt: skip
    base = pair.to(tl.int64) * (SPLITS + 1)
    _store_partial(PO, PL, acc, top, den, base + 1 + split, live, ROWS, MR, DP)
    tl.debug_barrier()
    if tl.atomic_add(TICKET + pair, 1, sem="acq_rel") == active - 1:
        tl.store(TICKET + pair, 0)
        drawn, lse = _merge_splits(PO + base * MR * DP, PL + base * MR, active + 1, m * G, MR, DP, SB, CHUNK)
        row = tl.arange(0, MR)
        rd = tl.arange(0, DP)
        alive = row < m * G
        token = q0 + row // G
        hq = head * G + row % G
        level = tl.load(LSE + token * (H * G) + hq, mask=alive, other=0.0)
        part = tl.sigmoid(lse + tl.log(tail.to(tl.float32) / b.to(tl.float32)) - level)
        at = OUT + token[:, None] * o_tok + hq[:, None] * o_head + rd[None, :]
        ok = alive[:, None] & (rd < D)[None, :]
        listed = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        tl.store(at, (listed + part[:, None] * (drawn - listed)).to(OUT.dtype.element_ty), mask=ok)


@dataclass
class SampleBuffers:
    """Partials of both launches, and the draws of each request and KV head; allocated once."""

    out: Tensor
    lse: Tensor
    moments: Tensor
    sizes: Tensor
    ticket: Tensor

    @classmethod
    def allocate(
        cls, requests: int, heads: int, rows: int, head_size: int, device: torch.device | str
    ) -> SampleBuffers:
        """Room for any number of requests up to `requests`, `rows` query rows a KV head."""
        mr, dp = triton.next_power_of_2(rows), triton.next_power_of_2(head_size)
        parts = max(r * heads * (sample_splits(r * heads) + 1) for r in range(1, requests + 1))

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        ints = zeros(2, requests, heads, dtype=torch.int32)
        return cls(zeros(parts * mr * dp), zeros(parts * mr), zeros(parts * 2 * mr), ints[0], ints[1])


def sample_splits(pairs: int) -> int:
    """Programs of a request and KV head: four for each SM of an H100, since every tile waits for two gathers."""
    return min(MAX_SPLITS - 1, splits_for(pairs, 528))


def tail_sample(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    slot_mapping: Tensor,
    ids: Tensor,
    counts: Tensor,
    out: Tensor,
    lse: Tensor,
    stats: Tensor,
    buffers: SampleBuffers,
    target: Target,
    *,
    seed: int,
    layer: int,
    max_query_len: int,
    scale: float,
    first_head: int = 0,
    splits: int | None = None,
) -> Tensor:
    """Add the sampled tail to the attention over lists; shapes as in `reference`.

    Args:
        ids, counts: logical page lists as `score_select` leaves them; counts = -1 has no tail.
        out [T, Hq, D], lse [T, Hq] fp32: the lists' result; `out` is updated in place.
        stats: counters; keys drawn are added to the keys read. first_head: number of KV head 0 in the whole model.

    Returns:
        draws of each request and KV head, [R, H] int32, a view of `buffers.sizes`.
    """
    requests, heads = seq_lens.shape[0], k_cache.shape[1]
    g, d, page = q.shape[1] // heads, q.shape[2], k_cache.shape[2]
    mr, dp = triton.next_power_of_2(max_query_len * g), triton.next_power_of_2(d)
    splits = sample_splits(requests * heads) if splits is None else splits
    sb = triton.next_power_of_2(splits + 1)
    shape = {
        "H": heads, "G": g, "ROWS": padded_rows(max_query_len, g), "MR": mr, "D": d, "DP": dp, "P": page,
        "SPLITS": splits, "SB": sb, "CHUNK": min(sb, max(1, 4096 // (mr * dp))), "DRAWS": DRAWS,
        "LOG": ids.shape[2].bit_length() + 1, "num_warps": 4,
    }  # fmt: skip
    strides = (
        ids.shape[2], block_table.stride(0), q.stride(0), q.stride(1), out.stride(0), out.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
    )  # fmt: skip
    _pilot[(requests * heads, splits)](
        q, k_cache, v_cache, block_table, seq_lens, query_start_loc, slot_mapping, ids, counts, out, lse,
        buffers.out, buffers.lse, buffers.moments, buffers.sizes, buffers.ticket, stats,
        scale, seed, layer, first_head, target.pilot, target.pilot_rate, target.factor, target.cap, *strides, **shape,
        OUTPUT=target.guarantee == GUARANTEES[1],
    )  # fmt: skip
    _rest[(requests * heads, splits)](
        q, k_cache, v_cache, block_table, seq_lens, query_start_loc, ids, counts, out, lse,
        buffers.out, buffers.lse, buffers.sizes, buffers.ticket,
        scale, seed, layer, first_head, target.pilot, target.pilot_rate, *strides, **shape,
    )  # fmt: skip
    return buffers.sizes[:requests]
