"""The same draft length in every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_ext.options import ConfigError, option
from vllm_ext.spec_decode.method import LengthMethod


@dataclass(frozen=True)
class Fixed(LengthMethod):
    """A baseline for length policies: vLLM's own behaviour, through the policy's machinery."""

    name: ClassVar[str] = "fixed"

    drafts: int = option(4, "drafts that are verified for every request", unit="tokens", minimum=0, maximum=32)

    def __post_init__(self) -> None:
        if self.drafts and self.drafts not in self.lengths:
            raise ConfigError(
                f"fixed.drafts is {self.drafts}, which is not in fixed.lengths ({', '.join(map(str, self.lengths))}); "
                "add it there, so that it is captured as a graph."
            )

    def check(self, vllm_config: Any) -> None:
        super().check(vllm_config)
        most = vllm_config.speculative_config.num_speculative_tokens
        if self.drafts > most:
            raise ConfigError(
                f"fixed.drafts is {self.drafts}, but the drafter makes at most {most}; raise its "
                "num_speculative_tokens, or lower fixed.drafts."
            )

    def policy(self, vllm_config: Any) -> Any:
        from vllm_ext.spec_decode.draft_length import FixedPolicy

        return FixedPolicy(self.drafts)
