"""Plain-PyTorch specification of the gate of SeerAttention-R (arXiv 2506.08889, section 3); the product on CPUs.

Shapes as in `reference`, and E the width of the gate. Per layer and KV head: `wq` [H, g * D, E] (the g query heads of a
group one after the other), `wk` [H, 3 * D, E], norm weights `q_norm`, `k_norm` [E] shared by the heads. The gate works
on queries and keys *before* the rotary embedding; the cache holds rotated keys, so the rotation is undone: it is
orthogonal, hence exact up to rounding. Rotations are those of halves: channel c turns with channel c + rot / 2.

All arithmetic is fp32. Gate keys are stored in the dtype of the KV cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-6
"""Of the gate's RMS norms."""


def rope_tables(inv_freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) [..., rot / 2] fp32 of `positions` [...]; inv_freq [rot / 2]."""
    angle = positions[..., None].float() * inv_freq.float()
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., D] in fp32; cos, sin broadcast to [..., rot / 2], channels from rot on are left."""
    half = cos.shape[-1]
    a, b, rest = x.float().split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of `rotate`."""
    return rotate(x, cos, -sin)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., E] over the root of its mean square, times `weight` [E]."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()


def pool(keys: Tensor) -> Tensor:
    """Maximum, minimum and mean over the tokens of a block: [..., P, D] -> [..., 3 * D], in this order."""
    keys = keys.float()
    return torch.cat([keys.amax(-2), keys.amin(-2), keys.mean(-2)], -1)


def gate_keys(pooled: Tensor, wk: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gate keys of blocks: pooled [..., N, H, 3 * D] of keys before rotary -> [..., N, H, E] fp32.

    cos, sin: [N, rot / 2], of the position of each block's *first* token.
    """
    k = torch.einsum("...hc,hce->...he", pooled.float(), wk.float())
    return rotate(rms_norm(k, k_norm), cos[:, None], sin[:, None])


def gate_queries(q: Tensor, wq: Tensor, q_norm: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gate queries of tokens: q [..., T, Hq, D] before rotary -> [..., T, H, E] fp32; cos, sin [T, rot / 2]."""
    heads = wq.shape[0]
    x = torch.einsum("...hc,hce->...he", q.float().unflatten(-2, (heads, -1)).flatten(-2), wq.float())
    return rotate(rms_norm(x, q_norm), cos[:, None], sin[:, None])


def page_record(
    keys: Tensor, first: int, wk: Tensor, k_norm: Tensor, inv_freq: Tensor, gate_freq: Tensor
) -> Tensor:  # fmt: skip
    """Index record of one full page: keys [H, P, D] as cached, position of its first token -> [H, E] fp32."""
    positions = first + torch.arange(keys.shape[1], device=keys.device)
    plain = unrotate(keys, *rope_tables(inv_freq, positions))
    at = rope_tables(gate_freq, positions[:1])
    return gate_keys(pool(plain)[None], wk, k_norm, *at)[0]


def queries(
    q: Tensor, n: int, wq: Tensor, q_norm: Tensor, inv_freq: Tensor, gate_freq: Tensor
) -> Tensor:  # fmt: skip
    """Gate queries of one request: q [m, Hq, D] as attention sees it, the last token at n - 1 -> [m, H, E] fp32."""
    m = q.shape[0]
    positions = torch.arange(n - m, n, device=q.device)
    cos, sin = rope_tables(inv_freq, positions)
    return gate_queries(unrotate(q, cos[:, None], sin[:, None]), wq, q_norm, *rope_tables(gate_freq, positions))


def page_scores(gate_q: Tensor, gate_k: Tensor, n: int, page: int) -> Tensor:
    """Logits of the gate: gate_q [m, H, E], gate_k [N, H, E] -> [H, N] fp32, the largest of the m tokens.

    An incomplete page has no record: -inf.
    """
    s = torch.einsum("mhe,nhe->mhn", gate_q.float(), gate_k.float()).amax(0) / math.sqrt(gate_q.shape[-1])
    s[:, n // page :] = -math.inf
    return s


def above_threshold(scores: Tensor, ids: Tensor, threshold: float, first: int, last: int) -> list[Tensor]:
    """Of each head's list, the pages whose softmax over all complete pages exceeds `threshold`, and the forced ones.

    Args:
        scores: [H, N] of `page_scores`; ids: [H, c] ascending; pages below `first` and from `last` on are forced.

    Returns:
        H ascending lists of different lengths.
    """
    p = scores.softmax(-1).nan_to_num(0.0)
    found = []
    for h, row in enumerate(ids.long()):
        keep = (p[h, row] > threshold) | (row < first) | (row >= last)
        found.append(ids[h][keep])
    return found


def max_pooled_attention(q: Tensor, k: Tensor, rows: Tensor, page: int, scale: float) -> Tensor:
    """What the gate learns: for some rows, the largest attention weight in each block, over the block and the group.

    Args:
        q: [B, Hq, n, D], k: [B, H, n, D], rotary applied, n a multiple of `page`; rows: [r] positions of queries.

    Returns:
        [B, H, r, n / page] fp32, not normalised (section 3.2).
    """
    b, heads, n, d = k.shape
    x = q[:, :, rows].float().reshape(b, heads, -1, d) @ k.float().transpose(-1, -2)  # [B, H, g * r, n]
    x = x.unflatten(2, (-1, rows.numel())) * scale
    hidden = torch.arange(n, device=q.device) > rows[:, None]
    x = x.masked_fill(hidden, -math.inf).softmax(-1)
    return x.unflatten(-1, (-1, page)).amax(-1).amax(2)
