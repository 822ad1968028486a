"""HardKuma: a gate in [0, 1] that is exactly 0 or 1 with positive probability (LycheeDecode, section 3.3).

Kumaraswamy(alpha, beta) on (0, 1), stretched to (-0.1, 1.1) and clipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW, HIGH = -0.1, 1.1
ZERO = -LOW / (HIGH - LOW)
"""Where the stretched variable crosses 0, in the base variable."""


def clamp(parameter: Tensor) -> Tensor:
    """alpha or beta within the range where powers stay finite."""
    return parameter.clamp(1e-6, 100.0)


def sample(alpha: Tensor, beta: Tensor, u: Tensor) -> Tensor:
    """z in [0, 1] from uniform numbers u (broadcast), differentiable in alpha and beta."""
    u = u.clamp(1e-6, 1 - 1e-6)
    x = (1 - (1 - u) ** (1 / clamp(beta))) ** (1 / clamp(alpha))
    return (LOW + (HIGH - LOW) * x).clamp(0.0, 1.0)


def nonzero(alpha: Tensor, beta: Tensor) -> Tensor:
    """Probability that z is not 0: (1 - ZERO ** alpha) ** beta."""
    return (1 - ZERO ** clamp(alpha)) ** clamp(beta)


def mean(alpha: Tensor, beta: Tensor) -> Tensor:
    """Mean of the base variable (before stretching): beta * B(1 + 1 / alpha, beta)."""
    a, b = 1 + 1 / clamp(alpha), clamp(beta)
    return b * (torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)).exp()
