"""Mean cosine of every token to its fellows, never as a matrix. Specification: `kv_reference.redundancy`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64


@triton.jit(do_not_specialize=["n", "k_head"])
def _mean_cosine(K, OUT, n, k_head, k_tok, threshold, RECENT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                 TN: tl.constexpr):  # fmt: skip
    keys = K + tl.program_id(1).to(tl.int64) * k_head
    rd = tl.arange(0, DP)
    mine = tl.program_id(0) * TN + tl.arange(0, TN)
    a = tl.load(keys + mine[:, None] * k_tok + rd[None, :], mask=(mine < n)[:, None] & (rd < D)[None, :], other=0.0)
    norm = tl.sqrt(tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)) + 1e-12
    total = tl.zeros([TN], tl.float32)
    left_out = tl.zeros([TN], tl.float32)
    for begin in range(0, n, TN):
        other = begin + tl.arange(0, TN)
        b = tl.load(
            keys + other[None, :] * k_tok + rd[:, None], mask=(other < n)[None, :] & (rd < D)[:, None], other=0.0
        )
        length = tl.sqrt(tl.sum(b.to(tl.float32) * b.to(tl.float32), 0)) + 1e-12
        cosine = tl.dot(a, b, input_precision="ieee") / (norm[:, None] * length[None, :])
        fellow = (other < n)[None, :] & (other[None, :] != mine[:, None])
        cosine = tl.where(fellow, cosine, 0.0)
        total += tl.sum(cosine, 1)
        if RECENT:
            newest = tl.max(tl.where(fellow & (cosine > threshold), other[None, :], -1), 1)
            value = tl.sum(tl.where(other[None, :] == newest[:, None], cosine, 0.0), 1)
            left_out = tl.where(newest >= 0, value, left_out)
    tl.store(OUT + tl.program_id(1).to(tl.int64) * n + mine, (total - left_out) / n, mask=mine < n)


def redundancy(keys: Tensor, threshold: float, recent: int) -> Tensor:
    """See `kv_reference.redundancy`; keys [L, H, n, D] contiguous, recent 0 or 1."""
    layers, heads, n, d = keys.shape
    out = torch.empty(layers, heads, n, dtype=torch.float32, device=keys.device)
    flat = keys.reshape(layers * heads, n, d)
    _mean_cosine[(triton.cdiv(n, TILE), layers * heads)](
        flat, out, n, flat.stride(0), flat.stride(1), threshold, RECENT=bool(recent), D=d,
        DP=max(16, triton.next_power_of_2(d)), TN=TILE, num_warps=4,
    )  # fmt: skip
    return out.softmax(-1)
