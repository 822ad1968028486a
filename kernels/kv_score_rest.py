"""ReST-KV: how far the layer's output moves if a token is removed (An et al., ICLR 2026).

Without token j the softmax is shared out anew: `o' - o = a_j / (1 - a_j) (o - v_j)`. Shapes: L layers, H KV heads,
Hq = H * G query heads, w window queries, n tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ext.kernels.kv_score_defensive import quadratic

LEAST_REST = 1e-4
"""Least value of 1 - a_j: a sink takes nearly all attention."""
LEAST_POOL = 5


def moving_average(window: int, alpha: float) -> Tensor:
    """Weights [w] of the exponential moving average over the window, oldest query first; they sum to 1."""
    power = torch.arange(window - 1, -1, -1, dtype=torch.float64)
    weights = alpha * (1 - alpha) ** power
    weights[0] = (1 - alpha) ** (window - 1)
    return weights.float()


def reconstruction(attention: Tensor, values: Tensor, gram: Tensor, tau: float = 1.0) -> Tensor:
    """`a_j / (1 - a_j) * ||(o - v_j) W_O||_2^tau` of the tokens of one layer.

    Args:
        attention: [Hq, n] smoothed attention; it need not sum to 1.
        values: [H, n, D].
        gram: [Hq, D, D] fp32, `W_O W_O^T` by query head.

    Returns:
        [Hq, n] fp32; o is `sum_j a_j v_j`.
    """
    heads, v = values.shape[0], values.float()
    by_group = attention.unflatten(0, (heads, -1))
    grams = gram.unflatten(0, (heads, -1))
    out = torch.empty_like(by_group)
    for g in range(by_group.shape[1]):
        a = by_group[:, g]
        moved = quadratic((a[:, None] @ v) - v, grams[:, g]).sqrt()
        out[:, g] = a / (1 - a).clamp(min=LEAST_REST) * moved**tau
    return out.flatten(0, 1)


def centroid_drift(early: Tensor, late: Tensor) -> Tensor:
    """Mean position that the first half of the window attends to, less that of the second: [..., n] twice -> [...].

    An estimate of `rank_drift` that needs no sort.
    """
    at = torch.arange(early.shape[-1], device=early.device, dtype=torch.float32)

    def centre(a: Tensor) -> Tensor:
        return (a * at).sum(-1) / a.sum(-1).clamp(min=torch.finfo(torch.float32).tiny)

    return centre(early) - centre(late)


def rank_drift(attention: Tensor, count: int) -> Tensor:
    """Mean difference, rank by rank, of the `count` most attended positions of the two halves of the window.

    Args:
        attention: [..., w, n]; the halves are queries [0, w // 2) and [w // 2, 2 * (w // 2)).

    Returns:
        [...] tokens.
    """
    half = attention.shape[-2] // 2
    order = attention.sort(dim=-1, descending=True, stable=True).indices[..., :count].float()
    return (order[..., :half, :] - order[..., half : 2 * half, :]).mean((-2, -1))


def adaptive_pool(x: Tensor, drift: Tensor, beta: float) -> Tensor:
    """Average pooling whose width and shift follow the drift of the attention.

    Args:
        x: [..., n].
        drift: [...] tokens.
        beta: tokens of drift a step of the window.

    Returns:
        [..., n]: mean of `x` over `k = max(5, 2 floor(|drift| / beta) + 1)` tokens, from `k // 2 - shift` before to
        `k // 2 + shift` behind, `shift = sign(drift) floor(|drift| / beta)`; beyond the ends the last value repeats.
    """
    n = x.shape[-1]
    step = (drift.abs() / beta).floor()
    width = (2 * step + 1).clamp(min=LEAST_POOL)
    shift = drift.sign() * step
    total = torch.cat([torch.zeros_like(x[..., :1]), x], -1).double().cumsum(-1)

    def before(i: Tensor) -> Tensor:
        """Sum of the values in front of index i, which may lie beyond the ends."""
        inside = total.gather(-1, i.clamp(0, n).long())
        below = i.clamp(max=0) * x[..., :1].double()
        return inside + below + (i - n).clamp(min=0) * x[..., -1:].double()

    at = torch.arange(n, device=x.device, dtype=torch.float64)
    first = at - (width // 2 - shift)[..., None]
    end = at + (width // 2 + shift)[..., None] + 1
    return ((before(end) - before(first)) / width[..., None]).float()
