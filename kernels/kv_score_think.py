"""ThinKV: thoughts by the sparsity of attention, segments that shrink by a schedule, medoids that stay (ICLR 2026).

That the tokens nearest to the k-means centres stay is this package's reading; the paper speaks of the centres.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TRANSITION, EXECUTION, REASONING = 0, 1, 2
"""Thought types, by importance."""
SCHEDULE = (64, 32, 16, 8, 4)
LEAST_SHARE = 0.01


def sparsity(attention: Tensor, visible: Tensor) -> Tensor:
    """Share of the visible attention entries below 1 % of their row's maximum.

    Args:
        attention: [L, Hq, w, n]; visible: [w] tokens that each query sees.

    Returns:
        [L] fp32: mean over heads and queries.
    """
    n = attention.shape[-1]
    seen = torch.arange(n, device=attention.device) < visible[:, None]
    low = (attention < LEAST_SHARE * attention.amax(-1, keepdim=True)) & seen
    return (low.sum(-1) / visible.clamp(min=1)).float().mean((1, 2))


def thought(value: float, low: float, high: float) -> int:
    """Type of a segment from its mean sparsity and the two thresholds."""
    return EXECUTION if value < low else REASONING if value < high else TRANSITION


def shrink(
    held: Sequence[int], types: Sequence[int], budget: int | None, schedule: Sequence[int] = SCHEDULE
) -> list[int]:
    """Tokens that each segment keeps at a boundary, oldest segment first.

    Case 1: the newest segment is a transition: every earlier segment goes one step down the schedule. Case 2: while
    more than `budget` tokens are held, the oldest segment of the least important type that can still shrink goes one
    step down.

    Args:
        held: tokens of each segment now.
        types: their types.
        budget: None = no limit.
    """
    kept = list(held)

    def step(size: int) -> int:
        return next((s for s in schedule if s < size), size)

    if types and types[-1] == TRANSITION:
        kept[:-1] = [step(k) for k in kept[:-1]]
    while budget is not None and sum(kept) > budget:
        able = [i for i, k in enumerate(kept) if step(k) < k]
        if not able:
            break
        i = min(able, key=lambda i: (types[i], i))
        kept[i] = step(kept[i])
    return kept


def fit(kept: Sequence[int], held: Sequence[int], budget: int, least: Sequence[int]) -> list[int]:
    """`kept` changed to `budget` tokens in all: counts must not depend on the text.

    Too few: segments get tokens back, the newest first, up to what they held. Too many although the schedule is at its
    end: the oldest lose theirs, down to `least` (tokens that stay whatever happens).
    """
    out = [max(k, m) for k, m in zip(kept, least)]
    for i in reversed(range(len(out))):
        out[i] += max(0, min(held[i] - out[i], budget - sum(out)))
    for i in range(len(out)):
        out[i] -= max(0, min(out[i] - least[i], sum(out) - budget))
    return out


def medoid_rank(keys: Tensor, forced: Tensor, count: int, rounds: int = 4) -> Tensor:
    """Which `count` tokens of a segment stand for it: worth of each, the highest stay.

    K-means with `count` centres, which start at evenly spaced tokens; of each cluster the token nearest to the centre
    stays, then, where clusters ran empty, the tokens nearest to any centre. `forced` tokens come before all.

    Args:
        keys: [B, m, D]; forced: [B, m] bool.

    Returns:
        [B, m] fp32.
    """
    k = keys.float()
    b, m, _ = k.shape
    if count >= m or count == 0:
        return forced.float() + torch.ones(b, m, device=keys.device)
    start = torch.linspace(0, m - 1, count, device=keys.device).round().long()
    centres = k[:, start]
    for _ in range(rounds):
        member = torch.nn.functional.one_hot(torch.cdist(k, centres).argmin(-1), count).to(k.dtype)
        size = member.sum(1)[..., None]
        centres = torch.where(size > 0, member.transpose(1, 2) @ k / size.clamp(min=1), centres)
    distance = torch.cdist(k, centres)
    near, cluster = distance.min(-1)
    own = torch.full((b, m, count), torch.inf, device=keys.device).scatter_(2, cluster[..., None], near[..., None])
    medoid = own.argmin(1)  # [b, count]; an empty cluster names token 0, which is looked up below
    best = own.amin(1).isfinite()
    chosen = torch.zeros(b, m, dtype=torch.long, device=keys.device).scatter_add_(1, medoid, best.long()) > 0
    closeness = 1 / (1 + near)
    return closeness + 2 * chosen + 4 * forced
