"""Parameters of the verification rules, shared by their reference and their kernels."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Rule(NamedTuple):
    """One rule that accepts or rejects draft tokens.

    Attributes:
        kind: `ratio` (token-wise ratio test), `hsd`, `cactus` or `fly`; see `spec_reference`.
        delta: cactus: divergence budget of a token, in nats.
        exact: cactus: solve for the budget by bisection instead of to second order.
        theta: fly: least entropy at which a mismatch can be forgiven.
        window: fly: drafts that must follow a forgiven mismatch within the step.
        entropy: fly: `normalized` by log V, or in nats over the `top3` tokens.
    """

    kind: Literal["ratio", "hsd", "cactus", "fly"]
    delta: float = 1.0
    exact: bool = False
    theta: float = 0.3
    window: int = 6
    entropy: Literal["normalized", "top3"] = "normalized"

    @property
    def lossless(self) -> bool:
        """Whether the output law is the target's."""
        return self.kind in ("ratio", "hsd") or (self.kind == "cactus" and self.delta == 0)

    @property
    def reads_draft_law(self) -> bool:
        """Whether the draft's probabilities matter where drafts are sampled."""
        return self.kind != "fly"
