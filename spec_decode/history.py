"""How often drafts were accepted, by request and position: the estimates that length policies decide on."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np

MEMORY = 24.0
"""Steps over which a request's rates are averaged; the first ones weigh more."""
PRIOR = 2.0
"""Steps that the engine's average counts for in a new request."""


class AcceptanceHistory:
    """Exponentially weighted rates at which draft k is accepted, given that all before it were.

    Args:
        drafts: K, the most drafts of a step.
    """

    def __init__(self, drafts: int) -> None:
        self.drafts = drafts
        self.overall = np.full(drafts, 0.5)
        self._rates: dict[str, np.ndarray] = {}
        self._seen: dict[str, np.ndarray] = {}

    def note(self, request: str, drafted: int, accepted: int) -> None:
        """`accepted` of `drafted` drafts of a request were accepted, 0 <= accepted <= drafted <= K."""
        tried = min(accepted + 1, drafted)
        if not tried:
            return
        outcome = np.ones(tried)
        outcome[accepted:] = 0.0
        rates = self._rates.setdefault(request, self.overall.copy())
        seen = self._seen.setdefault(request, np.full(self.drafts, PRIOR))
        rates[:tried] += (outcome - rates[:tried]) / (seen[:tried] + 1.0)
        seen[:tried] = np.minimum(seen[:tried] + 1.0, MEMORY)
        self.overall[:tried] += (outcome - self.overall[:tried]) * 0.01

    def survival(self, requests: Sequence[str]) -> np.ndarray:
        """[B, K] float64: estimated probability that a request's first k + 1 drafts are all accepted."""
        rates = [self._rates.get(r, self.overall) for r in requests]
        return np.cumprod(np.stack(rates), axis=1)

    def keep(self, requests: Container[str]) -> None:
        """Forget all other requests, now and then."""
        if len(self._rates) > 4096:
            for request in [r for r in self._rates if r not in requests]:
                del self._rates[request], self._seen[request]
