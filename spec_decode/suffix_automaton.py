"""Suffix automaton drafting: continue as the text did after the longest suffix that occurs before.

Hu et al., SAM-Decoding, 2024; the drafter that Liu et al., "Scaling Up, Speeding Up", 2025, find best for texts with
repetition. Deterministic drafts, lossless under every lossless rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_ext.options import option
from vllm_ext.spec_decode.method import DrafterMethod


@dataclass(frozen=True)
class SuffixAutomaton(DrafterMethod):
    """An online suffix automaton of each request, and optionally one of finished outputs, separate by tenant."""

    name: ClassVar[str] = "suffix_automaton"

    occurrence: str = option(
        "recent", "which earlier occurrence of the suffix is continued", choices=("recent", "first"), paper="first"
    )
    min_match: int = option(1, "shortest suffix that is continued", unit="tokens", minimum=1, maximum=1024, paper=5)
    window: int = option(
        32768, "tokens of a request that are remembered, about 130 bytes each", unit="tokens", minimum=256
    )
    shared: int = option(
        0, "tokens of finished outputs that later requests of the tenant draft from; 0 = none", unit="tokens", minimum=0
    )
    handicap: int = option(
        5, "by how much a match in finished outputs must be longer than one in the request", unit="tokens", minimum=0
    )

    @property
    def acts_in_scheduler(self) -> bool:
        return bool(self.shared)

    def lookup(self, requests: int, max_model_len: int) -> Any:
        from vllm_ext.spec_decode.tables import LookupSettings

        return LookupSettings(
            drafts=self.num_speculative_tokens,
            requests=requests,
            window=min(self.window, max_model_len + 1),
            shared=self.shared,
            arms=("longest" if self.occurrence == "recent" else "first", *(("shared",) if self.shared else ())),
            handicap=self.handicap,
            min_match=self.min_match,
        )
