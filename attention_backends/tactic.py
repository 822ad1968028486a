"""Tactic: read the fewest pages that hold a share of the attention mass (arXiv 2502.12216, section 4), page variant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vllm_ext.attention_backends.method import SparseMethod
from vllm_ext.options import ConfigError, option

if TYPE_CHECKING:
    from vllm_ext.attention_backends.stages import StageDims, Stages
    from vllm_ext.kernels.reference_mass import Mass


@dataclass(frozen=True)
class Tactic(SparseMethod):
    """Each query head ranks the pages by the logit of their mean key, the mass of the ranks is estimated from a few
    exact ones by a fit a / x + b, and the pages that reach `mass` of the estimated total are read, for the query heads
    of a KV head together. `budget` is the most that a step reads; `vllm_ext:capped_rows` counts lists that it cut
    short.

    The paper ranks K-means clusters of 16 keys made at the end of the prompt and reads single keys; groups of
    neighbours reach the same quality with more keys (its ablation). Pages need no state of the request and no second
    pass over it. Where the fitted curve starts and ends is not in the paper: `exact` and `sample`, in all about 2.5 %
    of the keys.
    """

    name: ClassVar[str] = "tactic"
    index: ClassVar[Literal["mean"]] = "mean"
    score: ClassVar[Literal["dot"]] = "dot"
    paper_values: ClassVar[Mapping[str, Any]] = {"page_size": "clusters of 16 keys", "budget": "unlimited"}

    budget: int = option(8192, "most keys read per query and KV head in a sparse step", unit="tokens", minimum=16)
    dense_below: int | None = option(2048, "requests up to this length are exact", unit="tokens", minimum=0)
    mass: float = option(0.9, "share of the attention mass that is read", minimum=0, maximum=1)
    exact: float = option(0.02, "share of the best pages whose mass is computed, not fitted", minimum=0, maximum=1)
    sample: float = option(0.0025, "share of the pages in each of the two segments of the fit", minimum=0, maximum=0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mass <= 0:
            raise ConfigError(f"tactic.mass must be above 0, got {self.mass}.")

    @property
    def least_keys(self) -> int:
        """The pages that are always read."""
        return (self.sink + self.local) * self.page_size

    @property
    def target(self) -> Mass:
        """What the kernels are given."""
        from vllm_ext.kernels.reference_mass import Mass

        return Mass(self.mass, self.exact, self.sample)

    def stages(self, dims: StageDims) -> Stages:
        """Pages by mass, then attention over them."""
        from vllm_ext.attention_backends.tactic_stages import TacticStages

        return TacticStages(self, dims)

    def banner(self, vllm_config: Any) -> dict[str, str]:
        """Rows of the engine; how much is read depends on the keys."""
        reads = f"pages for {self.mass:.0%} of the mass, at most {self.budget} of the visible keys, in decode steps"
        return super().banner(vllm_config) | {"reads": reads}
