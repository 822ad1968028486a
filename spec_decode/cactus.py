"""Cactus, constrained acceptance (Hao and Mou, ICLR 2026). NOT lossless: spends a divergence budget on every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_ext.options import option
from vllm_ext.spec_decode.method import VerifierMethod


@dataclass(frozen=True)
class Cactus(VerifierMethod):
    """Raises the drafted token's target probability as far as a divergence budget allows, then tests the ratio.

    Acts on requests with a temperature only. The budget bounds KL(h || p) of the law that a drafted token is tested
    against; the law of the output, a mixture of these, is not bounded by it but is never further from p than q is.
    """

    name: ClassVar[str] = "cactus"
    lossless: ClassVar[bool] = False

    delta: float = option(1.0, "divergence budget of a token", unit="nats", minimum=0, maximum=10, paper="0.75, 1.0")
    enforce: bool = option(
        False,
        "solve for the budget, instead of to second order, which exceeds it where the raised probability is > 1/2",
    )

    def verifier(self, vocab_size: int, device: Any) -> Any:
        from vllm_ext.kernels.spec_rules import Rule
        from vllm_ext.spec_decode.rules import RuleVerifier

        return RuleVerifier(Rule("cactus", delta=self.delta, exact=self.enforce))

    def banner(self, vllm_config: Any) -> dict[str, str]:
        how = "enforced" if self.enforce else "to second order"
        return super().banner(vllm_config) | {
            "budget": f"{self.delta:g} nats a token, {how}; greedy requests unchanged"
        }
