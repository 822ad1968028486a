"""The survivors of every layer and KV head in one launch. Specification: `kv_reference.choose`.

One program bisects the scores of one row for the smallest survivor, then writes the survivors in order, by
tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ext.kernels.score_select import _sort_key

TILE = 2048


@triton.jit
def _count(S, threshold, sinks, recent, TN: tl.constexpr):
    """How many free keys are at least `threshold`."""
    found = tl.zeros([TN], tl.int32)
    for begin in range(0, recent, TN):
        at = begin + tl.arange(0, TN)
        free = (at >= sinks) & (at < recent)
        key = _sort_key(tl.load(S + at, mask=free, other=0.0) + 0.0).to(tl.int64)
        found += (free & (key >= threshold)).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit(do_not_specialize=["chosen", "sinks", "recent", "count", "s_row"])
def _select_survivors(SCORES, OUT, chosen, sinks, recent, count, s_row, TN: tl.constexpr):
    S = SCORES + tl.program_id(0).to(tl.int64) * s_row
    out = OUT + tl.program_id(0).to(tl.int64) * count
    need = count - sinks - (chosen - recent)
    low = tl.full([], -0x80000000, tl.int64)
    high = tl.full([], 0x80000000, tl.int64)
    for _ in range(0, 32):
        middle = low + (high - low) // 2
        enough = _count(S, middle, sinks, recent, TN) >= need
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    # Among the keys equal to the threshold the newest survive: skip the oldest of them.
    skip = _count(S, low, sinks, recent, TN) - need
    ties = tl.zeros([], tl.int32)
    written = tl.zeros([], tl.int32)
    for begin in range(0, chosen, TN):
        at = begin + tl.arange(0, TN)
        free = (at >= sinks) & (at < recent)
        key = _sort_key(tl.load(S + at, mask=free, other=0.0) + 0.0).to(tl.int64)
        tie = (free & (key == low)).to(tl.int32)
        rank = ties + tl.cumsum(tie, 0)
        forced = (at < chosen) & ((at < sinks) | (at >= recent))
        keep = forced | (free & (key > low)) | ((tie > 0) & (rank > skip))
        taken = keep.to(tl.int32)
        tl.store(out + written + tl.cumsum(taken, 0) - 1, at.to(tl.int64), mask=keep)
        ties += tl.sum(tie, 0)
        written += tl.sum(taken, 0)


def choose(scores: Tensor, count: int, chosen: int, sinks: int, recent: int) -> Tensor:
    """See `kv_reference.choose`; scores [..., n] fp32 with a contiguous last axis. One launch, no host sync."""
    recent, sinks = min(recent, chosen), min(sinks, chosen)
    flat = scores.reshape(-1, scores.shape[-1])
    out = torch.empty(*scores.shape[:-1], count, dtype=torch.int64, device=scores.device)
    tile = min(TILE, max(16, triton.next_power_of_2(chosen)))
    _select_survivors[(flat.shape[0],)](
        flat, out, chosen, sinks, max(recent, sinks), count, flat.stride(0), TN=tile, num_warps=8
    )
    return out
