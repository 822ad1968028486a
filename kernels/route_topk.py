"""KERN and DirMoE routers in one launch: score, top-k and weights of a few tokens a program.

Specification: `reference_routing.kern` and `.dirmoe`. Ties go to the lower expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_EXPERTS = 1024
"""More experts than this are left to the reference."""


@triton.jit
def _topk(score, K: tl.constexpr, KB: tl.constexpr, R: tl.constexpr, EB: tl.constexpr):
    """Scores [R, EB] -> the K largest [R, KB] and their ids, the rest -inf and 0."""
    column = tl.arange(0, KB)[None, :]
    expert = tl.arange(0, EB)[None, :]
    values = tl.full((R, KB), float("-inf"), tl.float32)
    ids = tl.zeros((R, KB), tl.int32)
    for j in tl.static_range(K):
        best = tl.max(score, 1)
        at = tl.min(tl.where(score == best[:, None], expert, EB), 1)
        values = tl.where(column == j, best[:, None], values)
        ids = tl.where(column == j, at[:, None], ids)
        score = tl.where(expert == at[:, None], float("-inf"), score)
    return values, ids


@triton.jit
def _kern(
    LOGITS, WEIGHTS, IDS, tokens, row, gamma, eps,
    E: tl.constexpr, EB: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, R: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """`R` tokens: gamma * relu(s) / (||s|| + eps) of the K largest s; 1 / sum of them with SUM."""
    t = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    expert, column = tl.arange(0, EB)[None, :], tl.arange(0, KB)[None, :]
    live = (t < tokens) & (expert < E)
    s = tl.load(LOGITS + t * row + expert, mask=live, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(s * s, 1))
    values, ids = _topk(tl.where(expert < E, s, float("-inf")), K, KB, R, EB)
    weights = gamma * tl.maximum(values, 0.0) / (norm[:, None] + eps)
    weights = tl.where(column < K, weights, 0.0)
    if SUM:
        weights = weights / tl.maximum(tl.sum(weights, 1)[:, None], 1e-20)
    out = t * K + column
    tl.store(WEIGHTS + out, weights, mask=(t < tokens) & (column < K))
    tl.store(IDS + out, tl.where(weights > 0, ids, -1), mask=(t < tokens) & (column < K))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _dirmoe(
    LOGITS, HEADS, WEIGHTS, IDS, tokens, row, head_row, inverse_tau, ratio, floor, threshold,
    E: tl.constexpr, EB: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, R: tl.constexpr,
    HAS_HEADS: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """`R` tokens: K largest of log(z * alpha), a softmax over the kept ones. HEADS: high | low before softplus."""
    t = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    expert, column = tl.arange(0, EB)[None, :], tl.arange(0, KB)[None, :]
    live = (t < tokens) & (expert < E)
    x = tl.load(LOGITS + t * row + expert, mask=live, other=0.0).to(tl.float32) * inverse_tau
    z = 1.0 / (1.0 + tl.exp(-x))
    if HAS_HEADS:
        high = _softplus(tl.load(HEADS + t * head_row + expert, mask=live, other=0.0).to(tl.float32)) + floor
        low = _softplus(tl.load(HEADS + t * head_row + E + expert, mask=live, other=0.0).to(tl.float32)) + floor
        alpha = z * high + (1.0 - z) * low
    else:
        alpha = z * ratio + (1.0 - z)
    score = tl.log(alpha) - _softplus(-x)
    values, ids = _topk(tl.where(expert < E, score, float("-inf")), K, KB, R, EB)
    keep = column < K
    if CUT:
        gate = tl.zeros((R, KB), tl.float32)
        for j in tl.static_range(K):
            at = tl.sum(tl.where(column == j, ids, 0), 1)
            gate = tl.where(column == j, tl.sum(tl.where(expert == at[:, None], z, 0.0), 1)[:, None], gate)
        keep = keep & ((gate > threshold) | (column == 0))
    weights = tl.where(keep, tl.exp(values - tl.max(values, 1)[:, None]), 0.0)
    weights = weights / tl.sum(weights, 1)[:, None]
    out = t * K + column
    tl.store(WEIGHTS + out, weights, mask=(t < tokens) & (column < K))
    tl.store(IDS + out, tl.where(keep, ids, -1), mask=(t < tokens) & (column < K))


def sizes(num_experts: int, top_k: int) -> dict[str, int]:
    """Constants of a launch."""
    wide = triton.next_power_of_2(num_experts)
    rows = max(1, 1024 // wide)
    return {"E": num_experts, "EB": wide, "K": top_k, "KB": triton.next_power_of_2(top_k), "R": rows}


def _outputs(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (len(logits), top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def kern(
    logits: torch.Tensor, top_k: int, gamma: float = 1.0, eps: float = 1e-6, sum_to_one: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference_routing.kern` of logits [T, E] with unit stride in E, any float dtype."""
    weights, ids = _outputs(logits, top_k)
    if len(logits):
        size = sizes(logits.shape[1], top_k)
        grid = (triton.cdiv(len(logits), size["R"]),)
        _kern[grid](logits, weights, ids, len(logits), logits.stride(0), gamma, eps, SUM=sum_to_one, **size)
    return weights, ids


def dirmoe(
    logits: torch.Tensor,
    top_k: int,
    tau: float,
    heads: torch.Tensor | None,
    floor: float,
    ratio: float,
    threshold: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference_routing.dirmoe` of logits [T, E].

    Args:
        heads: [T, 2E], the high concentrations before softplus, then the low ones; None = the constants `ratio` and 1.
        floor: added after the softplus.
        ratio: high concentration where there are no heads.
        logits, top_k, tau, threshold: see the reference.
    """
    weights, ids = _outputs(logits, top_k)
    if len(logits):
        size = sizes(logits.shape[1], top_k)
        grid = (triton.cdiv(len(logits), size["R"]),)
        _dirmoe[grid](
            logits, logits if heads is None else heads, weights, ids, len(logits), logits.stride(0),
            0 if heads is None else heads.stride(0), 1 / tau, ratio, floor, threshold or 0.0,
            HAS_HEADS=heads is not None, CUT=threshold is not None, **size,
        )  # fmt: skip
    return weights, ids
