"""Hierarchical speculative decoding (Zhou et al., ICLR 2026, section 4, capped branch ratios): lossless on blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_ext.spec_decode.method import VerifierMethod


@dataclass(frozen=True)
class Hsd(VerifierMethod):
    """Keeps the last draft whose whole prefix passes, instead of stopping at the first that fails.

    Never fewer tokens in expectation than the token-wise test, and more where drafts are sampled. On deterministic
    drafts the two are the same rule.
    """

    name: ClassVar[str] = "hsd"

    def verifier(self, vocab_size: int, device: Any) -> Any:
        from vllm_ext.kernels.spec_rules import Rule
        from vllm_ext.spec_decode.rules import RuleVerifier

        return RuleVerifier(Rule("hsd"))

    def banner(self, vllm_config: Any) -> dict[str, str]:
        lines = super().banner(vllm_config)
        if vllm_config.speculative_config.draft_sample_method != "probabilistic":
            lines["gain"] = "none with deterministic drafts: the rule is then the token-wise one"
        return lines
