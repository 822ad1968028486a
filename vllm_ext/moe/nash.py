"""The Nash bargaining point of NAMEx (arXiv 2510.16138): weights alpha > 0 with `(G^T G) alpha = 1 / alpha`.

The experts are players who each want a step along their own difference to the base; `G = [tau_1 .. tau_N]` holds these
differences. alpha is the stationary point of the strictly convex `f(a) = a^T A a / 2 - sum log a`, A = G^T G, which
Newton's method finds in a few steps.
"""

from __future__ import annotations

import torch

LIMIT = 1e3
"""`max(alpha) * sqrt(mean A_ii)` beyond which there is no solution: a combination of the players' wishes vanishes."""


class NoBargain(ValueError):
    """The players' wishes cancel out: the base lies in the convex hull of the experts, e.g. it is their mean."""


def nash_weights(gram: torch.Tensor, *, tolerance: float = 1e-12, steps: int = 100) -> torch.Tensor:
    """Solve `gram @ alpha = 1 / alpha`.

    Args:
        gram: [N, N], inner products of the differences tau_i; any unit, alpha has the inverse one.
        tolerance: largest residual `|alpha_i (A alpha)_i - 1|`.
        steps: most Newton steps; about 5 are taken.

    Returns:
        alpha [N] fp64. `alpha^T A alpha = N`, so the joint step `sum_i alpha_i tau_i` has length sqrt(N).

    Raises:
        NoBargain: no solution, or a player whose tau is zero (leave it out).
    """
    a = gram.double()
    unit = a.diagonal().mean().sqrt()
    if not bool((a.diagonal() > 1e-18 * unit.square()).all()) or not torch.isfinite(unit):
        raise NoBargain("an expert equals the base, so it has nothing to bargain for.")
    a = a / unit.square()
    x = (a.diagonal() + a.abs().sum(1)).rsqrt()
    for _ in range(steps):
        residual = a @ x - 1 / x
        if float((residual * x).abs().max()) <= tolerance:
            break
        move = torch.linalg.solve(a + torch.diag(x**-2), -residual)
        x = _backtrack(a, x, move)
        if float(x.max()) > LIMIT:
            raise NoBargain("the experts' differences to the base cancel out.")
    else:
        raise NoBargain("the experts' differences to the base nearly cancel out.")
    return x / unit


def _backtrack(a: torch.Tensor, x: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
    """x + t * move with the largest t of 1, 1/2, 1/4, ... that stays positive and lowers f."""

    def value(y: torch.Tensor) -> float:
        return float(y @ a @ y / 2 - y.log().sum())

    step, before = 1.0, value(x)
    for _ in range(60):
        y = x + step * move
        # near the solution f is flat to rounding; a full positive step is then right
        if bool((y > 0).all()) and value(y) <= before + 1e-12 * abs(before):
            return y
        step /= 2
    return x
