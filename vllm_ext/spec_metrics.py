"""Counters of speculation, by drafter and rule, `vllm_ext:spec_*`; see `totals`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm_ext import totals

FAMILY = "spec"
HELP = {
    "spec_steps": "verifications of a request's drafts",
    "spec_drafted": "draft tokens verified",
    "spec_accepted": "draft tokens accepted",
    "spec_accepted_at": "draft tokens accepted, by position in the draft",
    "spec_draft_seconds": "time spent in the look-up drafters on the host",
}


class Publisher(totals.Publisher):
    """Hands a worker's totals on; `rule` is the name of the verification rule."""

    def __init__(self, vllm_config: Any, rule: str) -> None:
        super().__init__(vllm_config, FAMILY, HELP)
        self.rule = rule

    def publish(self, arms: Sequence[str], counters: Any, seconds: float | None) -> None:
        """Totals of each arm, [len(arms), 3 + K] as in `lookup.step`; seconds on the host or None."""
        if self.due():
            self.write(self.samples(arms, counters, seconds))

    def samples(self, arms: Sequence[str], counters: Any, seconds: float | None) -> Iterable[totals.Sample]:
        """(name, labels, total) of everything that is not zero."""
        for arm, row in zip(arms, counters.tolist()):
            labels = {"drafter": arm, "rule": self.rule}
            for name, value in zip(("spec_steps", "spec_drafted", "spec_accepted"), row):
                if value:
                    yield name, labels, value
            for position, value in enumerate(row[3:]):
                if value:
                    yield "spec_accepted_at", {**labels, "position": str(position)}, value
        if seconds is not None:
            yield "spec_draft_seconds", {"drafter": "all", "rule": self.rule}, seconds
