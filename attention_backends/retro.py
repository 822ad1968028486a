"""RetroAttention within a decode step: tokens of a window correct one another (arXiv 2508.09001, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_ext.attention_backends.quest import Quest
from vllm_ext.options import ConfigError

if TYPE_CHECKING:
    from vllm_ext.attention_backends.stages import StageDims, Stages


@dataclass(frozen=True)
class Retro(Quest):
    """Every query token of a step chooses pages by Quest's bound, and every one reads what any of them chose.

    Pages loaded for one token of the window supplement the others; merging the own and the supplementary partial
    results by their log-sum-exp is attention over the union, which is what is computed, in one pass. The corrected
    outputs feed the keys and values that later layers write for these same tokens, in the same step.

    The window of an unmodified engine is the step's query tokens: 1 + the drafted ones under speculative decoding.
    The paper's window also holds tokens of earlier steps: their outputs are corrected later, and their keys and values
    in the layers above are computed and written again. That is out of reach here: a step only runs the tokens that the
    scheduler has not computed yet, and cached keys may already be shared with other requests by prefix caching. A
    correction without that rewriting would change nothing that any later token reads. So without speculation this
    method is Quest, token for token.
    """

    name: ClassVar[str] = "retro"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local < 2:
            raise ConfigError(f"retro.local must be at least 2 pages, not {self.local}; raise it or use quest.")

    def stages(self, dims: StageDims) -> Stages:
        """Lists by token, then their union."""
        from vllm_ext.attention_backends.union_stages import UnionStages

        return UnionStages(self, dims)

    def banner(self, vllm_config: Any) -> dict[str, str]:
        """Quest's rows and the window."""
        drafts = getattr(vllm_config.speculative_config, "num_speculative_tokens", None) or 0
        text = (
            f"{1 + drafts} query tokens share their pages" if drafts else "1 token: the same as quest (no speculation)"
        )
        return super().banner(vllm_config) | {"window": text}
