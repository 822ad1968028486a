"""Routers of mixture-of-experts layers in plain torch: the specification of `route_topk.py`, and the product on CPUs.

All take gate logits [T, E] and return weights [T, W] fp32 and expert ids [T, W] int32, the largest weight first. A
column without an expert has id -1 and weight 0. Fixed shapes, nothing read back to the host.
"""

from __future__ import annotations

import torch

Routed = tuple[torch.Tensor, torch.Tensor]


def softmax_topk(logits: torch.Tensor, top_k: int, renormalize: bool) -> Routed:
    """The K largest of softmax(logits); `renormalize` scales them to sum 1."""
    weights, ids = torch.softmax(logits.float(), dim=-1).topk(top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), ids.int()


def kern(logits: torch.Tensor, top_k: int, gamma: float = 1.0, eps: float = 1e-6, sum_to_one: bool = False) -> Routed:
    """KERN (arXiv 2509.25913): `g = gamma * relu(s / (||s||_2 + eps))`, the norm over all E logits, then the K largest.

    Args:
        logits: [T, E], s.
        top_k: K; a token with fewer positive logits gets fewer experts, and with none the routed output is 0.
        gamma, eps: of the formula.
        sum_to_one: scale the kept weights of a token to sum 1 (not in the paper).
    """
    s = logits.float()
    top, ids = s.topk(top_k, dim=-1)
    weights = gamma * top.clamp(min=0) / (s.square().sum(-1, keepdim=True).sqrt() + eps)
    if sum_to_one:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
    return weights, torch.where(weights > 0, ids, -1).int()


def dirmoe(
    logits: torch.Tensor,
    top_k: int,
    tau: float,
    high: torch.Tensor | float,
    low: torch.Tensor | float,
    threshold: float | None = None,
) -> Routed:
    """DirMoE (arXiv 2602.09001) without noise: Bernoulli gates times the mean of the Dirichlet weights.

    `z = sigmoid(s / tau)`, `alpha = z * high + (1 - z) * low`, `u = z * alpha / sum(alpha)`; the kept u of a token are
    scaled to sum 1, so the sum over alpha cancels.

    Args:
        logits: [T, E], s.
        top_k: most experts a token.
        tau: temperature of the gates.
        high, low: concentrations of an open and a closed gate, [T, E] or one number; high > low > 0.
        threshold: keep only experts with z above it, and the best one always; None keeps K.
    """
    x = logits.float() / tau
    z = torch.sigmoid(x)
    log_u = torch.nn.functional.logsigmoid(x) + torch.log(z * high + (1 - z) * low)
    top, ids = log_u.topk(top_k, dim=-1)
    keep = torch.ones_like(top, dtype=torch.bool) if threshold is None else z.gather(1, ids) > threshold
    keep[:, 0] = True
    weights = torch.softmax(top.masked_fill(~keep, float("-inf")), dim=-1)
    return weights, torch.where(keep, ids, -1).int()


def concentration_ratio(mass: float, num_experts: int, top_k: int) -> float:
    """`high / low` that puts this share of the expected Dirichlet mass on K open gates of E (DirMoE, calibration)."""
    return mass / (1 - mass) * (num_experts - top_k) / top_k


def rounded_counts(counts: torch.Tensor, tile: int, mode: str, tokens: int) -> torch.Tensor:
    """Pairs an expert gets: the multiple of `tile` that is `nearest` (ties go down), next `up` or `down`; at most T."""
    floor = counts // tile * tile
    ceil = torch.where(counts == floor, floor, floor + tile)
    up = {"up": True, "down": False}.get(mode)
    chosen = torch.where(ceil - counts < counts - floor, ceil, floor) if up is None else ceil if up else floor
    return torch.where(counts == floor, counts, chosen).clamp(max=tokens)


def token_rounding(
    logits: torch.Tensor, top_k: int, renormalize: bool, tile: int, mode: str = "nearest", extra: int = 3
) -> Routed:
    """Token rounding of SonicMoE (arXiv 2512.14080): every expert's number of tokens becomes a multiple of the tile.

    Experts drop their weakest tokens or take the best of those that did not choose them. Dropped pairs leave a token
    with fewer experts; added ones weigh their raw softmax score, without renormalisation. A token keeps at most
    K + extra.

    Args:
        logits: [T, E].
        top_k: K.
        renormalize: whether the model scales the K weights to sum 1.
        tile: rows of a tile, M.
        mode: "nearest", "up" or "down".
        extra: columns beyond K.

    Returns:
        Weights and ids with W = K + extra columns.
    """
    tokens, num_experts = logits.shape
    scores = torch.softmax(logits.float(), dim=-1)
    top, ids = scores.topk(top_k, dim=-1)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, ids, True)
    share = scores / top.sum(-1, keepdim=True)
    # chosen pairs rank above all others, and both groups keep their order
    preference = torch.where(chosen, share, scores - 1)
    order = preference.argsort(dim=0, descending=True, stable=True)
    places = torch.arange(tokens, device=logits.device).unsqueeze(1).expand_as(order)
    rank = torch.empty_like(order).scatter_(0, order, places)
    kept = rank < rounded_counts(chosen.sum(0), tile, mode, tokens)
    weights = torch.where(chosen, share, scores) if renormalize else scores
    width = min(top_k + extra, num_experts)
    value, ids = weights.masked_fill(~kept, -1).topk(width, dim=-1)
    used = value >= 0
    return value.clamp(min=0), torch.where(used, ids, -1).int()
