"""Plain-PyTorch specification of `mass_select`: the fewest pages that hold a given attention mass (Tactic, section 4).

Shapes as in `reference`. For each query row the pages that are not forced are ranked: by the logit of their mean key,
or by the mass that their clusters promise (`reference_clusters`). Exact masses of the forced pages, of the first ranks
and of two short segments further down give, with a fit a / x + b, the mass of every rank; the row keeps the shortest
prefix that reaches the target. The rows of a KV head share the union.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_ext.kernels.reference import causal_limit, forced_pages, grouped

CENTRES = (0.1, 0.6)
"""Where the segments lie, as shares of the ranks."""


@dataclass(frozen=True)
class Mass:
    """The target.

    Attributes:
        mass: share of the softmax mass to keep, of the estimated total; 1 keeps every page.
        exact: share of the ranks at the top whose mass is exact; sample: of each of the two segments.
    """

    mass: float = 0.9
    exact: float = 0.02
    sample: float = 0.0025

    def ranks(self, free: int) -> tuple[int, int, int, int, int]:
        """(exact ranks, start and end of the first segment, start and end of the second) of `free` pages."""
        size = torch.tensor(float(free))
        head = max(1, int(torch.ceil(size * self.exact)))
        width = max(1, int(torch.ceil(size * self.sample)))
        first, second = (max(head, int(size * c) - width // 2) for c in CENTRES)
        second = max(second, first + width)
        if second + width > free:
            return free, free, free, free, free  # too few pages for a fit: all exact
        return head, first, first + width, second, second + width

    def most_ranks(self, pages: int) -> int:
        """At least the ranks, exact and in segments, of any number of free pages up to `pages`: room in buffers."""
        head, width = (math.ceil(pages * share) + 1 for share in (self.exact, self.sample))
        return min(pages, max(8, head + 2 * width))


def fit(y1: float, y2: float, ranks: tuple[int, int, int, int, int]) -> tuple[float, float]:
    """(a, b) of the mass a / x + b of rank x from the mean masses of two segments, a >= 0; x counts from 1."""
    _, s1, e1, s2, e2 = ranks
    c1, c2 = (math.log((e + 0.5) / (s + 0.5)) / (e - s) for s, e in ((s1, e1), (s2, e2)))
    if y1 <= y2:
        return 0.0, (y1 + y2) / 2
    a = (y1 - y2) / (c1 - c2)
    return a, y1 - a * c1


def fitted_mass(a: float, b: float, first: int, last: int) -> float:
    """Integral of max(a / x + b, 0) over ranks first .. last - 1."""
    low, high = first + 0.5, last + 0.5
    if b < 0:
        high = min(high, max(low, -a / b))
    return a * math.log(high / low) + b * (high - low)


def kept_ranks(
    forced: float, head: list[float], y1: float, y2: float, ranks: tuple[int, ...], free: int, mass: float
) -> int:
    """Pages that a row keeps beside the forced ones: exact masses `head` by rank, mean masses of the segments."""
    if mass >= 1:
        return free
    top = len(head)
    a, b = fit(y1, y2, ranks) if top < free else (0.0, 0.0)  # type: ignore[arg-type]
    total = forced + sum(head) + (fitted_mass(a, b, top, free) if top < free else 0.0)
    reached, need = forced, mass * total
    if reached >= need:
        return 0
    for k, x in enumerate(head):
        reached += x
        if reached >= need:
            return k + 1
    low, high = top, free
    while high - low > 1:
        middle = (low + high) // 2
        if reached + fitted_mass(a, b, top, middle) >= need:
            high = middle
        else:
            low = middle
    return high


def select_mass(
    q: Tensor, k_cache: Tensor, scores: Tensor, pages: Tensor, n: int, scale: float, capacity: int, sink: int,
    local: int, target: Mass,
) -> tuple[Tensor, Tensor, int, int]:  # fmt: skip
    """Lists of one request: q [m, Hq, D], scores [H, rows, N], which rank the pages.

    Returns:
        ids [H, C] int32 ascending, tail -1; counts [H]; pages probed, summed over rows; lists that `capacity` cut.
    """
    heads, page, count = k_cache.shape[1], k_cache.shape[2], pages.numel()
    m, g = q.shape[0], q.shape[1] // heads
    first, last = forced_pages(n, m, page, sink, local)
    forced = torch.ones(count, dtype=torch.bool, device=q.device)
    forced[first:last] = False
    free = int((~forced).sum())
    rows, limit = grouped(q, heads), causal_limit(m, g, n, q.device)
    ids = torch.full((heads, capacity), -1, dtype=torch.int32, device=q.device)
    counts = torch.zeros(heads, dtype=torch.int32, device=q.device)
    probed = cut = 0
    position = torch.arange(count * page, device=q.device).view(count, page)
    for h in range(heads):
        margin = torch.full((count,), -math.inf, device=q.device)
        for i, s in enumerate(scores[h]):
            if not free:
                break
            order = s.masked_fill(forced, -math.inf).sort(descending=True, stable=True).indices[:free]
            ranks = target.ranks(free)
            logits = (k_cache[pages, h].float() @ rows[h, i]) * scale
            lse = logits.masked_fill(position >= limit[i], -math.inf).logsumexp(-1)
            head, one, two = order[: ranks[0]], order[ranks[1] : ranks[2]], order[ranks[3] : ranks[4]]
            probes = torch.cat([forced.nonzero().flatten(), head, one, two])
            w = (lse - lse[probes].amax()).exp()
            y1, y2 = (float(w[x].mean()) if x.numel() else 0.0 for x in (one, two))
            kept = kept_ranks(float(w[forced].sum()), w[head].tolist(), y1, y2, ranks, free, target.mass)
            probed += probes.numel()
            if kept:
                margin = torch.maximum(margin, s - s[order[kept - 1]])
        chosen = forced | (margin >= 0)
        total = int(chosen.sum())
        cut += total > capacity
        rank = margin.masked_fill(forced, math.inf).sort(descending=True, stable=True).indices[: min(total, capacity)]
        ids[h, : rank.numel()] = rank.sort().values.to(torch.int32)
        counts[h] = rank.numel()
    return ids, counts, probed, cut
