"""How steady a model's routing is: SRP and SCH (Not All Models Suit Expert Offloading, arXiv 2505.16056), and load.

The inputs are lists of boolean arrays [T, E] of one layer, one for each segment of consecutive tokens of a request:
entry t, e says whether token t uses expert e.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Segments = Sequence[np.ndarray]
Policy = Literal["sch", "lru", "belady"]
Rank = Callable[[int, np.ndarray], np.ndarray]


def activations(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """[T, W] expert ids -> bool [T, E]; ids outside 0..E-1 are unused columns."""
    wide = ids.astype(np.int64)
    active = np.zeros((len(ids), num_experts + 1), dtype=bool)
    active[np.arange(len(ids))[:, None], np.where((wide >= 0) & (wide < num_experts), wide, num_experts)] = True
    return active[:, :num_experts]


def segments(requests: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """Requests [T, ...] cut into pieces of at most `length` tokens."""
    return [r[i : i + length] for r in requests for i in range(0, len(r), length) if len(r[i : i + length])]


def window_counts(layer: Segments, window: int) -> np.ndarray:
    """int64 [E, window + 1]: number of windows of `window` consecutive tokens (stride 1) with that many activations."""
    num_experts = layer[0].shape[1]
    counts = np.zeros((num_experts, window + 1), dtype=np.int64)
    for active in layer:
        if len(active) < window:
            continue
        total = np.concatenate([np.zeros((1, num_experts), np.int64), np.cumsum(active, axis=0)])
        inside = total[window:] - total[:-window]
        flat = inside + np.arange(num_experts) * (window + 1)
        counts += np.bincount(flat.ravel(), minlength=counts.size).reshape(counts.shape)
    return counts


@dataclass(frozen=True)
class Srp:
    """Best F1 of a router that must decide once a window, its threshold, and experts switched on / experts needed."""

    f1: float
    threshold: int
    scale: float


def srp(counts: np.ndarray) -> Srp:
    """Segment routing best performance from `window_counts`, summed over experts (and layers) at a common threshold.

    Args:
        counts: [..., m + 1] windows by number of activations.

    With threshold a: matches = activations in windows with at least a, preds = m * such windows, acts = all activations
    of all windows; F1(a) = 2 matches / (preds + acts), and SRP is its maximum over a in 0..m.
    """
    window = counts.shape[-1] - 1
    by_count = counts.reshape(-1, window + 1).sum(0)
    used = by_count * np.arange(window + 1)
    matches, preds = used[::-1].cumsum()[::-1], window * by_count[::-1].cumsum()[::-1]
    total = used.sum()
    f1 = 2 * matches / np.maximum(preds + total, 1)
    best = int(f1.argmax())
    return Srp(float(f1[best]), best, float(preds[best] / max(total, 1)))


def hit_rate(layer: Segments, slots: int, policy: Policy = "sch", window: int = 16) -> float:
    """Share of required experts found in a cache of `slots` experts, empty at the start of each segment.

    `sch` (segment cache best hit rate) evicts the expert with the fewest activations in the next `window` tokens, ties
    to the least recently used; `lru` the least recently used; `belady` the one needed last. What the current token
    needs is never evicted. A load into a slot that is still free counts as a hit.

    Raises:
        ValueError: a token needs more experts than there are slots.
    """
    return rate(*hits(layer, slots, policy, window))


def rate(found: np.ndarray, needed: np.ndarray) -> float:
    """A hit rate from `hits`."""
    return float(found.sum() / max(needed.sum(), 1))


def hits(layer: Segments, slots: int, policy: Policy = "sch", window: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """`hit_rate` before the division: experts found and experts required of each segment, int64 [B] both."""
    active, need = _stacked(layer)
    if need.max(initial=0) > slots:
        raise ValueError(f"{slots} slots cannot hold the {need.max()} experts of a token.")
    steps, rows, num_experts = active.shape
    rank = _eviction_ranks(active, policy, window)
    present = np.zeros((rows, num_experts), dtype=bool)
    last = np.full((rows, num_experts), -1, dtype=np.int64)
    found = np.zeros(rows, dtype=np.int64)
    for t in range(steps):
        now = active[t]
        missing = now & ~present
        free = slots - present.sum(1)
        found += (now & present).sum(1) + np.minimum(missing.sum(1), free)
        present |= now
        last[now] = t
        excess = present.sum(1) - slots
        if (excess > 0).any():
            value = np.where(present & ~now, rank(t, last), np.iinfo(np.int64).max)
            order = value.argsort(axis=1, kind="stable").argsort(axis=1)
            present &= order >= np.maximum(excess, 0)[:, None]
    return found, need.sum(0)


RESAMPLES = 1000
"""Of the bootstrap over segments (the paper's)."""


def _resampled(rows: np.ndarray) -> np.ndarray:
    """Sums over segments drawn with replacement, [B, ...] -> [RESAMPLES, ...]."""
    draws = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES)
    return np.tensordot(draws, rows, 1)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def srp_interval(counts: np.ndarray) -> tuple[float, float]:
    """95 % interval of SRP, from the counts [B, m + 1] of each segment."""
    return _interval(np.array([srp(c).f1 for c in _resampled(counts)]))


def hit_interval(found: np.ndarray, needed: np.ndarray) -> tuple[float, float]:
    """95 % interval of a hit rate, from `hits`."""
    total = _resampled(np.stack([found, needed], axis=1))
    return _interval(total[:, 0] / np.maximum(total[:, 1], 1))


def _stacked(layer: Segments) -> tuple[np.ndarray, np.ndarray]:
    """Segments padded with tokens that need nothing: bool [T, B, E], and experts a token [T, B]."""
    longest = max(len(a) for a in layer)
    active = np.zeros((longest, len(layer), layer[0].shape[1]), dtype=bool)
    for b, a in enumerate(layer):
        active[: len(a), b] = a
    return active, active.sum(2)


def _eviction_ranks(active: np.ndarray, policy: Policy, window: int) -> Rank:
    """`rank(t, last)` -> int64 [B, E], smallest evicted first; `last` is when an expert was last used."""
    steps = len(active)
    if policy == "lru":
        return lambda t, last: last
    if policy == "belady":
        following = np.empty(active.shape, dtype=np.int64)
        nearest = np.full(active.shape[1:], 2 * steps, dtype=np.int64)
        for t in range(steps - 1, -1, -1):
            following[t] = nearest
            nearest = np.where(active[t], t, nearest)
        return lambda t, last: -following[t]
    total = np.concatenate([np.zeros((1, *active.shape[1:]), np.int32), active.cumsum(axis=0, dtype=np.int32)])

    def soon(t: int, last: np.ndarray) -> np.ndarray:
        count = total[min(t + 1 + window, steps)] - total[t + 1]
        return count.astype(np.int64) * (steps + 1) + last + 1

    return soon


@dataclass(frozen=True)
class Load:
    """How evenly the experts of a layer are used.

    Attributes:
        share: [E], pairs of each expert / all pairs.
        imbalance: most used expert / mean.
        deviation: standard deviation of the shares over their mean.
        unused: experts that no token used.
    """

    share: np.ndarray
    imbalance: float
    deviation: float
    unused: int


def load(layer: Segments) -> Load:
    """The load of one layer."""
    pairs = sum((a.sum(0, dtype=np.int64) for a in layer), start=np.zeros(layer[0].shape[1], np.int64))
    mean = max(pairs.mean(), 1e-12)
    return Load(
        pairs / max(pairs.sum(), 1), float(pairs.max() / mean), float(pairs.std() / mean), int((pairs == 0).sum())
    )
