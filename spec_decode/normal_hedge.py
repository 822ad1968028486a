"""HedgeSpec: no-regret choice among N drafters from one verified trajectory (Liu et al., ICLR 2026), with NormalHedge
(Chaudhuri et al., NeurIPS 2009).

Every verified token scores every drafter, whichever of them drafted: `g_t(i)` is the probability that drafter i's draft
at t is accepted. A round opened at token t asks how many tokens a draft of K from there would have given,
`L_t(i) = 1 + sum_k g_t(i) .. g_{t+k-1}(i)`, and is settled once K tokens are known, with the weights of its opening.
With `g = min(1, q_i(y)/p(y))` on the realised token y (a match indicator for deterministic drafters) L is unbiased.

The functions are plain loops over float64 and int64 arrays, so that they compile. State of a slot with n drafters and
horizon k: floats = regret [n] | weights [n] | k rounds of (running product [n], length so far [n], weights [n]),
ints = tokens seen, rounds settled.
"""

from __future__ import annotations

import math

from numpy import ndarray


def state_size(n: int, k: int) -> tuple[int, int]:
    """Floats and ints of one slot."""
    return 2 * n + 3 * n * k, 2


def reset(floats: ndarray, ints: ndarray, n: int) -> None:
    """A new request: no regret, uniform weights, no open rounds."""
    floats[:] = 0.0
    ints[:] = 0
    for i in range(n):
        floats[n + i] = 1.0 / n


def weights(regret: ndarray, out: ndarray) -> None:
    """NormalHedge weights of cumulative regrets [N] into out [N]; uniform where no regret is positive.

    The scale c solves `mean_i exp([R_i]+^2 / 2c) = e`; it lies between the solutions for one and for N leaders.
    """
    n = len(regret)
    top = 0.0
    for i in range(n):
        top = max(top, regret[i])
    if top <= 0.0:
        for i in range(n):
            out[i] = 1.0 / n
        return
    high = 0.5 * top * top
    low = high / math.log(n * math.e - n + 1.0)
    for _ in range(45):
        c = 0.5 * (low + high)
        mean = 0.0
        for i in range(n):
            r = max(regret[i], 0.0)
            mean += math.exp(0.5 * r * r / c) / n
        if mean > math.e:
            low = c
        else:
            high = c
    total = 0.0
    for i in range(n):
        r = max(regret[i], 0.0)
        out[i] = r * math.exp(0.5 * r * r / high)
        total += out[i]
    for i in range(n):
        out[i] /= total


def push(acceptance: ndarray, cost: ndarray, floats: ndarray, ints: ndarray, n: int, k: int) -> None:
    """Take in one verified token: extend the open rounds by it, settle the one that now covers its horizon.

    A round's loss is `1 - L_i / cost_i / best` with best = (K+1) / min cost, the largest value it could have; with
    equal costs it is the paper's `1 - L / (K+1)`.

    Args:
        acceptance: [n] float64 in [0, 1].
        cost: [n] float64 > 0, relative time of a step with each drafter.
    """
    seen = ints[0]
    ints[0] = seen + 1
    opened = 2 * n + 3 * n * (seen % k)
    for i in range(n):
        floats[opened + i] = 1.0
        floats[opened + n + i] = 1.0
        floats[opened + 2 * n + i] = floats[n + i]
    for j in range(min(seen + 1, k)):
        base = 2 * n + 3 * n * ((seen - j) % k)
        for i in range(n):
            floats[base + i] *= acceptance[i]
            floats[base + n + i] += floats[base + i]
    if seen + 1 < k:
        return
    base = 2 * n + 3 * n * ((seen + 1 - k) % k)
    cheapest = cost[0]
    for i in range(n):
        cheapest = min(cheapest, cost[i])
    mean = 0.0
    for i in range(n):
        loss = 1.0 - floats[base + n + i] / cost[i] * cheapest / (k + 1)
        floats[base + i] = loss
        mean += floats[base + 2 * n + i] * loss
    for i in range(n):
        floats[i] += mean - floats[base + i]
    ints[1] += 1
    weights(floats[:n], floats[n : 2 * n])


def leader(floats: ndarray, n: int) -> int:
    """The drafter with the largest weight, the lower one of equals."""
    best = 0
    for i in range(1, n):
        if floats[n + i] > floats[n + best]:
            best = i
    return best


def sample(floats: ndarray, n: int, u: float) -> int:
    """A drafter drawn by its weight, for a uniform u in [0, 1)."""
    for i in range(n):
        u -= floats[n + i]
        if u < 0.0:
            return i
    return n - 1
