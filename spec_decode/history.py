"""How often drafts were accepted, by request and position: the estimates that length policies decide on."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np

MEMORY = 24.0
"""Steps over which a request's rates are averaged; the first ones weigh more."""
ENGINE_MEMORY = 100.0
"""The same for the rates of all requests together."""
PRIOR = 2.0
"""Steps that what is expected counts for beside what was seen."""


class AcceptanceHistory:
    """Exponentially weighted rates at which draft k is accepted, given that all before it were.

    A position that was not tried is expected to do as the one before it, in the proportion that all requests show.

    Args:
        drafts: K, the most drafts of a step.
    """

    def __init__(self, drafts: int) -> None:
        self.drafts = drafts
        self._engine = np.zeros((2, drafts))
        self._seen: dict[str, np.ndarray] = {}
        """Accepted and tried, by position."""

    def note(self, request: str, drafted: int, accepted: int) -> None:
        """`accepted` of `drafted` drafts of a request were accepted, 0 <= accepted <= drafted <= K."""
        tried = min(accepted + 1, drafted)
        if not tried:
            return
        own = self._seen.setdefault(request, np.zeros((2, self.drafts)))
        for counts, memory in ((own, MEMORY), (self._engine, ENGINE_MEMORY)):
            counts[:, :tried] *= memory / np.maximum(counts[1, :tried] + 1.0, memory)
            counts[0, :accepted] += 1.0
            counts[1, :tried] += 1.0

    def rates(self, requests: Sequence[str]) -> np.ndarray:
        """[B, K] float64: estimated probability that draft k is accepted if those before it are."""
        none = np.zeros((2, self.drafts))
        known = np.stack([self._seen.get(r, none) for r in requests])
        level, own = 0.5, np.full(len(requests), 0.5)
        found = np.empty((len(requests), self.drafts))
        for k in range(self.drafts):
            before, level = level, (self._engine[0, k] + PRIOR * level) / (self._engine[1, k] + PRIOR)
            expected = np.minimum(own * (level / before), 1.0)
            own = (known[:, 0, k] + PRIOR * expected) / (known[:, 1, k] + PRIOR)
            found[:, k] = own
        return found

    def survival(self, requests: Sequence[str]) -> np.ndarray:
        """[B, K] float64: estimated probability that a request's first k + 1 drafts are all accepted."""
        return np.cumprod(self.rates(requests), axis=1)

    def keep(self, requests: Container[str]) -> None:
        """Forget all other requests, now and then."""
        if len(self._seen) > 4096:
            for request in [r for r in self._seen if r not in requests]:
                del self._seen[request]
