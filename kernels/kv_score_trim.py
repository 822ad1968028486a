"""TRIM-KV: a retention gate scores a token once, when it is made; the score decays with age (Bui et al., ICLR 2026)."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}
"""Activations of a gate by the names that Hugging Face configurations use."""


def log_retention(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b: Tensor, activation: str = "silu") -> Tensor:
    """Log of the retention of each token, `logsigmoid(W2 act(W1 x + b1) + b)`.

    Args:
        x: [..., D] input of the attention block (after its norm, before the QKV projection), any dtype.
        w1, b1: [I, D] and [I]; w2, b: [H, I] and [H] with H KV heads.
        activation: key of `ACTIVATIONS`.

    Returns:
        [..., H] fp32, at most 0.
    """
    inner = ACTIVATIONS[activation](torch.nn.functional.linear(x.to(w1.dtype), w1, b1))
    return torch.nn.functional.logsigmoid(torch.nn.functional.linear(inner.to(w2.dtype), w2, b).float())


def retention_scores(log_beta: Tensor, positions: Tensor, now: int | Tensor) -> Tensor:
    """`(now - position) * log beta`, the log of what is left of a token: [..., n] fp32, at most 0.

    Args:
        log_beta: [..., n] as stored with the tokens.
        positions: [..., n] integer position in the text of each token.
        now: position of the next token; larger than every position.
    """
    return (now - positions).float() * log_beta.float()


def gated_bias(log_beta: Tensor) -> Tensor:
    """What training adds to the logits: [..., T] -> [..., T, T], `(t - i) log beta_i` for i <= t, else -inf.

    The additive form: a forgotten token's weight goes to 0, as eviction makes it (the multiplicative form, which
    scales the logit, would send the logit to 0 and leave the token some weight).
    """
    n = log_beta.shape[-1]
    at = torch.arange(n, device=log_beta.device)
    age = at[:, None] - at[None, :]
    return (age.clamp(min=0) * log_beta[..., None, :]).masked_fill(age < 0, float("-inf"))


def capacity_loss(bias: Tensor, memory: int) -> Tensor:
    """`mean_t max(0, sum_{i<=t} beta_i^(t-i) - memory) / t`, averaged over all leading dimensions; a scalar.

    Args:
        bias: [..., T, T] of `gated_bias`.
        memory: tokens that a head may hold.
    """
    held = bias.float().exp().sum(-1)
    t = torch.arange(1, held.shape[-1] + 1, device=held.device)
    return ((held - memory).clamp(min=0) / t).mean()
