"""Mean cosine of every token to its fellows, never as a matrix. Specification: `kv_reference.redundancy`.

The sum of a token's cosines is the product of its unit key with the sum of all unit keys: linear in the tokens. Only
the newest near-duplicate needs the cosines of all pairs, tile by tile from the newest tokens on, until every token of a
program has found its own. Products are of raw keys on tensor cores; norms scale the fp32 results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ext.kernels.kv_compact import LayerCaches, _cache_of

SPAN = 6
"""Tiles that are compared between two looks at what is still open."""
PLAN, WIDE_PLAN = (128, 64, 8, 3), (64, 64, 4, 2)
"""Tokens of a program, tokens of a tile, warps, stages: two programs an SM. Wide: keys of more than 256 bytes, fp32."""
EPSILON = tl.constexpr(1e-12)


@triton.jit
def _places(row, tokens, n, k_page, k_tok, P: tl.constexpr):
    """Offsets of resident tokens in a cache; tokens outside [0, n) get any."""
    page = tl.load(row + tokens // P, mask=(tokens >= 0) & (tokens < n), other=0).to(tl.int64)
    return page * k_page + (tokens % P) * k_tok


@triton.jit(do_not_specialize=["n", "layers", "r_row"])
def _unit_sums(
    PTRS, CACHE, ROWS, INVERSE, SUMS, n, layers, r_row, k_page, k_head, k_tok, P: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, TN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """1 / norm of every key, and the sum of the unit keys of a tile."""
    part, head, entry = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    keys = _cache_of(PTRS, CACHE, entry % layers, ALIGN) + head * k_head
    rd = tl.arange(0, DP)
    mine = part * TN + tl.arange(0, TN)
    at = _places(ROWS + entry // layers * r_row, mine, n, k_page, k_tok, P)
    x = tl.load(keys + at[:, None] + rd[None, :], mask=(mine < n)[:, None] & (rd < D)[None, :], other=0.0)
    x = x.to(tl.float32)
    inverse = 1 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), EPSILON)
    group = entry * tl.num_programs(1) + head
    tl.store(INVERSE + group * n + mine, inverse, mask=mine < n)
    tl.store(SUMS + (group * tl.num_programs(0) + part) * DP + rd, tl.sum(x * inverse[:, None], 0))


@triton.jit
def _newest_alike(
    at, keys, row, inverses, mine, n, k_page, k_tok, threshold, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TM: tl.constexpr, TN: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """1 + newest other token whose cosine to each of `mine`, with keys `at`, is above the threshold; 0 = none."""
    rd = tl.arange(0, DP)
    a = tl.load(keys + at[:, None] + rd[None, :], mask=(mine < n)[:, None] & (rd < D)[None, :], other=0.0)
    limit = threshold / tl.load(inverses + mine, mask=mine < n, other=1.0)
    # not -1 for none: of a carried int32 constant below zero, Triton 3.6 takes `< 0` for false, and so never to change
    newest = tl.zeros([TM], tl.int32)
    left = tl.cdiv(n, TN)
    while left > 0:
        to = _places(row, (left - 1) * TN + tl.arange(0, TN), n, k_page, k_tok, P)
        for i in range(0, SPAN):
            other = (left - 1 - i) * TN + tl.arange(0, TN)
            ok = (other >= 0) & (other < n)
            b = tl.load(keys + to[None, :] + rd[:, None], mask=ok[None, :] & (rd < D)[:, None], other=0.0)
            to = _places(row, other - TN, n, k_page, k_tok, P)  # of the next tile: its keys need not wait for them
            theirs = tl.load(inverses + other, mask=ok, other=float("nan"))  # above no limit
            cosine = tl.dot(a, b, input_precision="ieee") * theirs[None, :]
            alike = (cosine > limit[:, None]) & (other[None, :] != mine[:, None])
            here = tl.max(tl.where(alike, other[None, :] + 1, 0), 1)
            newest = tl.where(newest == 0, here, newest)
        still = tl.max(((newest == 0) & (mine < n)).to(tl.int32), 0)
        left = tl.where(still > 0, left - SPAN, 0)
    return newest


@triton.jit(do_not_specialize=["n", "layers", "r_row"])
def _mean_cosine(
    PTRS, CACHE, ROWS, INVERSE, SUM, OUT, n, layers, r_row, k_page, k_head, k_tok, threshold, RECENT: tl.constexpr,
    P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
    SPAN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    head, entry = tl.program_id(1), tl.program_id(2).to(tl.int64)
    keys = _cache_of(PTRS, CACHE, entry % layers, ALIGN) + head * k_head
    row = ROWS + entry // layers * r_row
    group = entry * tl.num_programs(1) + head
    inverses = INVERSE + group * n
    mine = tl.program_id(0) * TM + tl.arange(0, TM)
    at = _places(row, mine, n, k_page, k_tok, P)
    to = at
    theirs = tl.zeros([TM], tl.float32)
    if RECENT:
        newest = _newest_alike(at, keys, row, inverses, mine, n, k_page, k_tok, threshold, P, D, DP, TM, TN, SPAN)
        to = _places(row, tl.maximum(newest - 1, 0), n, k_page, k_tok, P)
        theirs = tl.load(inverses + newest - 1, mask=newest > 0, other=0.0)  # none: nothing is left out
    total = tl.zeros([TM], tl.float32)
    own = tl.zeros([TM], tl.float32)
    left_out = tl.zeros([TM], tl.float32)
    for begin in range(0, DP, 16):  # in slices: registers
        rd = begin + tl.arange(0, 16)
        mask = (mine < n)[:, None] & (rd < D)[None, :]
        x = tl.load(keys + at[:, None] + rd[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x * tl.load(SUM + group * DP + rd)[None, :], 1)
        own += tl.sum(x * x, 1)
        if RECENT:
            y = tl.load(keys + to[:, None] + rd[None, :], mask=mask, other=0.0).to(tl.float32)
            left_out += tl.sum(x * y, 1)
    inverse = tl.load(inverses + mine, mask=mine < n, other=1.0)
    found = (total - own * inverse - left_out * theirs) * inverse
    tl.store(OUT + group * n + mine, found / n, mask=mine < n)


def redundancy(
    keys: LayerCaches, rows: Tensor, n: int, threshold: float, recent: int, layers: range | None = None
) -> Tensor:
    """`kv_reference.redundancy` of the `n` resident tokens of R requests in some layers.

    Args:
        keys: views [num_blocks, H, P, D] of the keys.
        rows: [R, blocks] int32, block tables from the first resident block on.
        n: resident tokens of each.
        threshold, recent: see the reference; recent is 0 or 1.
        layers: default all.

    Returns:
        [R * L, H, n] fp32.
    """
    pointers, (_, heads, page, d) = keys.pointers_of(layers), keys.like.shape
    entries, width = len(pointers) * rows.shape[0], max(16, triton.next_power_of_2(d))
    fits = keys.like.element_size() == 2 and width <= 128
    mine, tile, warps, stages = PLAN if fits else WIDE_PLAN
    parts = triton.cdiv(n, tile)
    make = {"dtype": torch.float32, "device": keys.like.device}
    inverse, out = torch.empty(entries, heads, n, **make), torch.empty(entries, heads, n, **make)
    sums = torch.empty(entries, heads, parts, width, **make)
    numbers = (n, len(pointers), rows.stride(0), *keys.like.stride()[:3])
    sizes = {"P": page, "D": d, "DP": width, "TN": tile, "ALIGN": keys.align}
    _unit_sums[(parts, heads, entries)](pointers, keys.like, rows, inverse, sums, *numbers, **sizes, num_warps=4)
    _mean_cosine[(triton.cdiv(n, mine), heads, entries)](
        pointers, keys.like, rows, inverse, sums.sum(2), out, *numbers, threshold, RECENT=bool(recent), TM=mine,
        SPAN=SPAN, num_warps=warps, num_stages=stages, **sizes,
    )  # fmt: skip
    return out.softmax(-1)
