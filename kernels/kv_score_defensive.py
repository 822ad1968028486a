"""DefensiveKV: the worst case over the window with a floor, weighted by values, after a first choice by mean attention.

Formulas of DefensiveKV (Feng et al., ICLR 2026); value weights and the two stages are CriticalKV's. Shapes: L
layers, H KV heads, Hq = H * G query heads, n tokens, D head size, E hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def value_norms(values: Tensor, output: Tensor, norm: str) -> Tensor:
    """Mean over the GQA group of `||v_j W_O^h||`.

    Args:
        values: [H, n, D].
        output: for "l1" W_O by query head [Hq, D, E]; for "l2" its Gram matrix W_O W_O^T [Hq, D, D].
        norm: "l1" (the paper) or "l2", which needs no product with E columns.

    Returns:
        [H, n] fp32.
    """
    heads = values.shape[0]
    total = torch.zeros(values.shape[:2], device=values.device)
    by_group = output.unflatten(0, (heads, -1)).unbind(1)
    for part in by_group:
        if norm == "l1":
            total += (values @ part.to(values.dtype)).abs().sum(-1, dtype=torch.float32)
        else:
            total += quadratic(values.float(), part.float()).sqrt()
    return total / len(by_group)


def quadratic(x: Tensor, gram: Tensor) -> Tensor:
    """`x gram x^T` of each row: x [..., n, D], gram [..., D, D] -> [..., n], not below 0."""
    return ((x @ gram) * x).sum(-1).clamp(min=0)


def with_floor(worst: Tensor) -> Tensor:
    """`max(R_j, mean_j R)`: a token that the window overlooked counts as an average one. [..., n] -> [..., n]."""
    return torch.maximum(worst, worst.mean(-1, keepdim=True))


def first_stage(mean: Tensor, past: int, room: int, mass: float) -> Tensor:
    """The fewest past tokens whose mean attention, with the window's, reaches `mass`.

    Args:
        mean: [..., n] attention averaged over window and group; rows sum to 1.
        past: tokens before the window.
        room: most tokens to take.
        mass: share of the attention, 0.9 in the paper.

    Returns:
        [..., past] bool.
    """
    target = mass - mean[..., past:].sum(-1, keepdim=True)
    ordered, index = mean[..., :past].sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    taken = (before < target) & (torch.arange(past, device=mean.device) < room)
    return torch.zeros_like(taken).scatter(-1, index, taken)


def defensive_scores(worst: Tensor, norms: Tensor, first: Tensor, over: str) -> Tensor:
    """Scores of the past tokens of L layers.

    Args:
        worst: [L, H, past] largest pooled attention over window and group.
        norms: [L, H, past] `value_norms`.
        first: [L, H, past] bool, the first stage's choice, which is kept whatever its score.
        over: what the norms are divided by: their sum over "tokens" (the paper's text) or over "heads" (its code).

    Returns:
        [L, H, past] fp32.
    """
    axis = {"tokens": -1, "heads": 1}[over]
    weights = norms / norms.sum(axis, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scores = with_floor(worst) * weights
    return torch.where(first, 2 * scores.amax((1, 2), keepdim=True) + scores, scores)
