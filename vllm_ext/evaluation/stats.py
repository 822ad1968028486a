"""Intervals for the tables: Wilson for shares, bootstrap for means. Plain Python and numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share.

    Args:
        successes: 0 to trials.
        trials: number of independent trials, at least 1.
        confidence: two-sided level.

    Raises:
        ValueError: trials < 1 or successes out of range.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"need 0 <= successes <= trials and trials >= 1, got {successes} of {trials}.")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == trials else (centre + half) / scale
    return low, high


def bootstrap_mean(
    groups: Sequence[Sequence[float] | np.ndarray], confidence: float = 0.95, rounds: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over all values, resampling whole groups.

    Positions of one text are correlated, so the text is the unit that is drawn with replacement; with a single
    group the values themselves are drawn, which understates the spread.

    Args:
        groups: one sequence of values a text.
        confidence: two-sided level.
        rounds: number of resamples.
        seed: makes the interval reproducible.

    Raises:
        ValueError: no values.
    """
    filled = [np.asarray(g, dtype=np.float64) for g in groups if len(g)]
    if not filled:
        raise ValueError("bootstrap_mean needs at least one value.")
    if len(filled) == 1:
        filled = [np.asarray([v]) for v in filled[0]]
    sums = np.array([g.sum() for g in filled])
    sizes = np.array([g.size for g in filled], dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(filled), size=(rounds, len(filled)))
    means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)
