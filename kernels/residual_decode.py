"""Split-KV attention over page lists that also works out a prior's share of the keys not listed, in one launch.

Specification: `reference_residual.residual_attention` and `fold`. Each listed key is loaded once and serves two query
vectors: the row's own and the prior's. The last split of a request and KV head merges, adds the prior, and then extends
it by the pages that are complete and verified since, for the next step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ext.kernels.reference_residual import LEAST_REST
from vllm_ext.kernels.score_select import padded_rows, query_rows
from vllm_ext.kernels.sparse_decode import _merge_splits, splits_for, stages_for

_LEAST = tl.constexpr(LEAST_REST)
SUMS = 6
"""Sums over covered listed keys kept for a row: prior weight, keys, x, x^2, e, e^2 (x: logit, e: its error)."""


@triton.jit
def _attend_both(
    q, mu, level, K, V, PAGES, IDS, lo, hi, ahead, is_list, covered, n, m, scale,
    k_page, k_head, k_tok, v_page, v_head, v_tok, head,
    G: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Online softmax over entries lo .. hi, and for those below `covered` the prior's weighted values and the sums."""
    rp = tl.arange(0, P)
    rd = tl.arange(0, DP)
    row = tl.arange(0, ROWS)
    limit = n - m + 1 + row // G
    scale2 = scale * 1.4426950408889634
    top = tl.full([ROWS], -1e30, tl.float32)
    den = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    pacc = tl.zeros([ROWS, DP], tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    keys_seen = 0
    x1 = tl.zeros([ROWS], tl.float32)
    x2 = tl.zeros([ROWS], tl.float32)
    e1 = tl.zeros([ROWS], tl.float32)
    e2 = tl.zeros([ROWS], tl.float32)
    for j in range(lo, hi):
        phys = tl.load(PAGES + j).to(tl.int64)
        known = tl.where(is_list, tl.load(IDS + j, mask=is_list, other=0), covered) < covered
        ok = rd < D
        at = K + head * k_head + phys * k_page + rp[None, :] * k_tok + rd[:, None]
        keys = tl.load(at, mask=ok[:, None], other=0.0)
        at = V + head * v_head + phys * v_page + rp[:, None] * v_tok + rd[None, :]
        values = tl.load(at, mask=ok[None, :], other=0.0)
        x = tl.dot(q, keys, input_precision="ieee") * scale2
        estimate = tl.dot(mu, keys, input_precision="ieee") * scale2
        p = tl.where(known, tl.exp2(estimate - level[:, None]), 0.0)
        high = p.to(values.dtype)
        pacc = tl.dot(high, values, pacc, input_precision="ieee")
        pacc = tl.dot((p - high.to(tl.float32)).to(values.dtype), values, pacc, input_precision="ieee")
        weight += tl.sum(p, 1)
        error = tl.where(known, x - estimate, 0.0)
        exact = tl.where(known, x, 0.0)
        keys_seen += tl.where(known, P, 0)
        x1 += tl.sum(exact, 1)
        x2 += tl.sum(exact * exact, 1)
        e1 += tl.sum(error, 1)
        e2 += tl.sum(error * error, 1)
        x = tl.where(((ahead + j) * P + rp)[None, :] < limit[:, None], x, float("-inf"))
        new = tl.maximum(top, tl.max(x, 1))
        w = tl.exp2(x - new[:, None])
        fade = tl.exp2(top - new)
        acc = tl.dot(w.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
        den = den * fade + tl.sum(w, 1)
        top = new
    return acc, top, den, pacc, weight, keys_seen, x1, x2, e1, e2


@triton.jit
def _add_prior(
    out, lse, query, PP, PS, MU, LEVEL, SHARED, MEAN, at, active, alive, scale, log_weight, gate,
    G: tl.constexpr, MR: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The list's result [MR, DP] merged with the prior of the covered keys that are not listed."""
    row = tl.arange(0, MR)
    rd = tl.arange(0, DP)
    inside = alive[:, None] & (rd < D)[None, :]
    pacc = tl.zeros([MR, DP], tl.float32)
    weight = tl.zeros([MR], tl.float32)
    seen = tl.zeros([MR], tl.float32)
    x1 = tl.zeros([MR], tl.float32)
    x2 = tl.zeros([MR], tl.float32)
    e1 = tl.zeros([MR], tl.float32)
    e2 = tl.zeros([MR], tl.float32)
    for s in range(0, active):
        cell = (s * MR + row[:, None]) * DP + rd[None, :]
        pacc += tl.load(PP + cell, mask=alive[:, None], other=0.0, cache_modifier=".cg")
        sums = PS + s * 6 * MR + row
        weight += tl.load(sums, mask=alive, other=0.0, cache_modifier=".cg")
        seen += tl.load(sums + MR, mask=alive, other=0.0, cache_modifier=".cg")
        x1 += tl.load(sums + 2 * MR, mask=alive, other=0.0, cache_modifier=".cg")
        x2 += tl.load(sums + 3 * MR, mask=alive, other=0.0, cache_modifier=".cg")
        e1 += tl.load(sums + 4 * MR, mask=alive, other=0.0, cache_modifier=".cg")
        e2 += tl.load(sums + 5 * MR, mask=alive, other=0.0, cache_modifier=".cg")
    seen = tl.maximum(seen, 1.0)
    spread = x2 / seen - (x1 / seen) * (x1 / seen)
    noise = e2 / seen - (e1 / seen) * (e1 / seen)
    explains = tl.where(spread > 1e-12, 1 - noise / tl.maximum(spread, 1e-12), 1.0)
    here = (at * G + row % G)[:, None] * D + rd[None, :]
    mu = tl.load(MU + here, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(MEAN + at * D + rd, mask=rd < D, other=0.0)
    shift = tl.sum((query - mu) * mean[None, :], 1) * scale
    level = tl.load(LEVEL + at * G + row % G, mask=alive, other=0.0)
    rest = 1 - weight
    use = (rest > _LEAST) & (explains >= gate)
    rest = tl.maximum(rest, _LEAST)
    shared = tl.load(SHARED + here, mask=inside, other=0.0)
    trust = tl.where(gate == float("-inf"), 1.0, tl.minimum(tl.maximum(explains, 0.0), 1.0))
    portion = tl.where(use, trust * tl.sigmoid(level + tl.log(rest) + shift + log_weight - lse), 0.0)
    return out + portion[:, None] * ((shared - pacc) / rest[:, None] - out)


@triton.jit
def _extend(
    MU, LEVEL, SHARED, MEAN, COVERED, K, V, BT, at, first, upto, scale, head,
    k_page, k_head, k_tok, v_page, v_head, v_tok,
    G: tl.constexpr, MR: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """`reference_residual.fold` of one KV head: pages `first` .. `upto` - 1, normally none or one."""
    rp = tl.arange(0, P)
    rd = tl.arange(0, DP)
    ok = rd < D
    for page in range(first, upto):
        phys = tl.load(BT + page).to(tl.int64)
        keys = tl.load(
            K + head * k_head + phys * k_page + rp[:, None] * k_tok + rd[None, :], mask=ok[None, :], other=0.0
        ).to(tl.float32)
        values = tl.load(
            V + head * v_head + phys * v_page + rp[:, None] * v_tok + rd[None, :], mask=ok[None, :], other=0.0
        ).to(tl.float32)
        for i in range(0, G):
            here = at * G + i
            mu = tl.load(MU + here * D + rd, mask=ok, other=0.0).to(tl.float32)
            x = tl.sum(keys * mu[None, :], 1) * scale
            level = tl.load(LEVEL + here)
            top = tl.maximum(tl.max(x, 0), level)
            old = tl.exp(level - top)
            p = tl.exp(x - top)
            total = old + tl.sum(p, 0)
            shared = tl.load(SHARED + here * D + rd, mask=ok, other=0.0)
            shared = (shared * old + tl.sum(values * p[:, None], 0)) / total
            tl.store(SHARED + here * D + rd, shared, mask=ok)
            tl.store(LEVEL + here, top + tl.log(total))
        mean = tl.load(MEAN + at * D + rd, mask=ok, other=0.0)
        mean += (tl.sum(keys, 0) / P - mean) / (page + 1)
        tl.store(MEAN + at * D + rd, mean, mask=ok)
        tl.debug_barrier()
    tl.store(COVERED + at, tl.maximum(first, upto))


@triton.jit
def _residual_decode(
    Q, K, V, BT, SEQ, START, SLOTS, IDS, PAGES, COUNTS, STATE, MU, LEVEL, SHARED, MEAN, COVERED,
    OUT, PO, PL, PP, PS, TICKET,
    scale, log_weight, gate, slots, capacity, bt_row, q_tok, q_head, o_tok, o_head,
    k_page, k_head, k_tok, v_page, v_head, v_tok,
    H: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, MR: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, SPLITS: tl.constexpr, SB: tl.constexpr, CHUNK: tl.constexpr,
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
    slot = tl.load(STATE + r)
    held = slot < slots
    at = slot * H + head
    covered = tl.load(COVERED + at, mask=held, other=0)
    q, live = query_rows(Q, q0, m, head, q_tok, q_head, G, ROWS, D, DP)
    row = tl.arange(0, ROWS)
    rd = tl.arange(0, DP)
    known = live & (covered + row * 0 > 0)
    mu = tl.load(MU + (at * G + row[:, None] % G) * D + rd[None, :], mask=known[:, None] & (rd < D)[None, :], other=0.0)
    level = tl.load(LEVEL + at * G + row % G, mask=known, other=0.0)
    first = pair.to(tl.int64) * capacity
    if is_list:
        pages = PAGES + first
    else:
        pages = BT + r.to(tl.int64) * bt_row
    acc, top, den, pacc, weight, seen, x1, x2, e1, e2 = _attend_both(
        q, mu, level * 1.4426950408889634, K, V, pages, IDS + first, split * share,
        tl.minimum((split + 1) * share, count), total - count, is_list, covered, n, m, scale,
        k_page, k_head, k_tok, v_page, v_head, v_tok, head, G, ROWS, P, D, DP,
    )  # fmt: skip
    safe = tl.where(den > 0, den, 1.0)
    lse = tl.where(den > 0, (top + tl.log2(safe)) * 0.6931471805599453, float("-inf"))
    part = pair.to(tl.int64) * SPLITS + split
    cell = (part * MR + row[:, None]) * DP + rd[None, :]
    tl.store(PO + cell, acc / safe[:, None], mask=live[:, None])
    tl.store(PP + cell, pacc, mask=live[:, None])
    tl.store(PL + part * MR + row, lse, mask=live)
    sums = PS + part * 6 * MR + row
    tl.store(sums, weight, mask=live)
    tl.store(sums + MR, tl.zeros([ROWS], tl.float32) + seen, mask=live)
    tl.store(sums + 2 * MR, x1, mask=live)
    tl.store(sums + 3 * MR, x2, mask=live)
    tl.store(sums + 4 * MR, e1, mask=live)
    tl.store(sums + 5 * MR, e2, mask=live)
    tl.debug_barrier()
    if tl.atomic_add(TICKET + pair, 1, sem="acq_rel") == active - 1:
        tl.store(TICKET + pair, 0)
        base = pair.to(tl.int64) * SPLITS * MR
        out, known_lse = _merge_splits(PO + base * DP, PL + base, active, m * G, MR, DP, SB, CHUNK)
        mrow = tl.arange(0, MR)
        alive = mrow < m * G
        token = q0 + mrow // G
        hq = head * G + mrow % G
        inside = alive[:, None] & (rd < D)[None, :]
        if is_list & (covered > 0):
            query = tl.load(Q + token[:, None] * q_tok + hq[:, None] * q_head + rd[None, :], mask=inside, other=0.0)
            out = _add_prior(
                out, known_lse, query.to(tl.float32), PP + base * DP, PS + base * 6, MU, LEVEL, SHARED, MEAN, at,
                active, alive, scale, log_weight, gate, G, MR, D, DP,
            )  # fmt: skip
        to = OUT + token[:, None] * o_tok + hq[:, None] * o_head + rd[None, :]
        tl.store(to, out.to(OUT.dtype.element_ty), mask=inside)
        if (covered > 0) & (tl.load(SLOTS + q0) >= 0):
            _extend(
                MU, LEVEL, SHARED, MEAN, COVERED, K, V, BT + r.to(tl.int64) * bt_row, at, covered, (n - m) // P,
                scale, head, k_page, k_head, k_tok, v_page, v_head, v_tok, G, MR, P, D, DP,
            )  # fmt: skip


@dataclass
class PriorState:
    """Priors of one layer: `slots` requests and one place for those without; fields as in `reference_residual.Prior`.

    mu [S + 1, H, G, D] in the model's dtype, level [S + 1, H, G], shared [S + 1, H, G, D], mean_key [S + 1, H, D] fp32,
    covered [S + 1, H] int32, total [S + 1, H, G, D] and queries [S + 1] fp32: sum and number of the prompt's queries.
    """

    mu: Tensor
    level: Tensor
    shared: Tensor
    mean_key: Tensor
    covered: Tensor
    total: Tensor
    queries: Tensor

    @classmethod
    def allocate(
        cls, slots: int, heads: int, g: int, d: int, dtype: torch.dtype, device: torch.device | str
    ) -> PriorState:
        """No request has a prior."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        s = slots + 1
        return cls(
            zeros(s, heads, g, d, dtype=dtype), zeros(s, heads, g), zeros(s, heads, g, d), zeros(s, heads, d),
            zeros(s, heads, dtype=torch.int32), zeros(s, heads, g, d), zeros(s),
        )  # fmt: skip


@dataclass
class ResidualBuffers:
    """Partials of `residual_decode`, allocated once."""

    out: Tensor
    prior: Tensor
    lse: Tensor
    sums: Tensor
    ticket: Tensor

    @classmethod
    def allocate(
        cls, requests: int, heads: int, rows: int, head_size: int, device: torch.device | str
    ) -> ResidualBuffers:
        """Room for any number of requests up to `requests`, `rows` query rows a KV head."""
        mr, dp = triton.next_power_of_2(rows), triton.next_power_of_2(head_size)
        parts = max(r * heads * splits_for(r * heads) for r in range(1, requests + 1))

        def zeros(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        return cls(
            zeros(parts * mr * dp), zeros(parts * mr * dp), zeros(parts * mr), zeros(parts * mr * SUMS),
            zeros(requests * heads, torch.int32),
        )  # fmt: skip


def residual_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    slot_mapping: Tensor,
    ids: Tensor,
    pages: Tensor,
    counts: Tensor,
    state: Tensor,
    prior: PriorState,
    out: Tensor,
    buffers: ResidualBuffers,
    *,
    log_weight: float,
    gate: float,
    max_query_len: int,
    scale: float,
    splits: int | None = None,
    num_stages: int | None = None,
) -> Tensor:
    """Attention of a decode batch over its lists and priors, into `out` [T, Hq, D]; lists as of `sparse_decode`.

    Args:
        ids, pages, counts: lists, logical and physical; state: [R] int64, the request's place in `prior`.
        log_weight: log of lambda; gate: see `reference_residual.residual_attention`.

    Priors of requests with a place are extended in place by pages that became complete before this step.
    """
    requests, heads = seq_lens.shape[0], k_cache.shape[1]
    g, d = q.shape[1] // heads, q.shape[2]
    rows = padded_rows(max_query_len, g)
    mr, dp = triton.next_power_of_2(max_query_len * g), triton.next_power_of_2(d)
    splits = splits_for(requests * heads) if splits is None else splits
    sb = triton.next_power_of_2(splits)
    _residual_decode[(requests * heads, splits)](
        q, k_cache, v_cache, block_table, seq_lens, query_start_loc, slot_mapping, ids, pages, counts, state,
        prior.mu, prior.level, prior.shared, prior.mean_key, prior.covered,
        out, buffers.out, buffers.lse, buffers.prior, buffers.sums, buffers.ticket,
        scale, log_weight, gate, prior.covered.shape[0] - 1, ids.shape[2], block_table.stride(0),
        q.stride(0), q.stride(1), out.stride(0), out.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        H=heads, G=g, ROWS=rows, MR=mr, D=d, DP=dp, P=k_cache.shape[2], SPLITS=splits, SB=sb,
        CHUNK=min(sb, max(1, 4096 // (mr * dp))),
        num_warps=4, num_stages=num_stages or min(3, stages_for(k_cache.shape[2], dp, rows)),
    )  # fmt: skip
    return out
