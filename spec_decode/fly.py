"""FLy, training-free loose verification (Li et al., ICLR 2026). NOT lossless: keeps some mismatches, also if greedy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_ext.options import ConfigError, option
from vllm_ext.spec_decode.method import VerifierMethod


@dataclass(frozen=True)
class Fly(VerifierMethod):
    """Keeps a draft that the target would not have written, if the target was unsure there and agrees again after it.

    The window is that of one step: a mismatch whose window the drafts do not fill is rejected. The paper is greedy; for
    requests with a temperature a match is "the target's sample is the draft" (not in the paper).
    """

    name: ClassVar[str] = "fly"
    lossless: ClassVar[bool] = False

    theta: float = option(0.3, "least entropy at which a mismatch can be kept", minimum=0, maximum=1.1)
    window: int = option(6, "drafts after a mismatch that must match", unit="tokens", minimum=0, maximum=31)
    entropy: str = option(
        "normalized",
        "normalized: by log V, 0 to 1 (paper); top3: nats over the three likeliest, and the window counts the mismatch "
        "(published code)",
        choices=("normalized", "top3"),
    )

    def __post_init__(self) -> None:
        most = 1.0 if self.entropy == "normalized" else math.log(3)
        if self.theta > most:
            raise ConfigError(
                f"fly.theta is {self.theta:g}, but entropy={self.entropy} is never above {most:.2f}: nothing would be "
                "kept; lower it."
            )

    def check(self, vllm_config: Any) -> None:
        super().check(vllm_config)
        drafts = vllm_config.speculative_config.num_speculative_tokens
        if drafts <= self.window:
            raise ConfigError(
                f"fly.window is {self.window}, which {drafts} drafts a step never fill; raise the drafter's "
                f"num_speculative_tokens above it (the paper drafts 15 to 25), or lower fly.window."
            )

    def verifier(self, vocab_size: int, device: Any) -> Any:
        from vllm_ext.kernels.spec_rules import Rule
        from vllm_ext.spec_decode.rules import RuleVerifier

        return RuleVerifier(Rule("fly", theta=self.theta, window=self.window, entropy=self.entropy))  # type: ignore[arg-type]
