"""Tactic: read the fewest pages that hold a share of the attention mass (arXiv 2502.12216, section 4), by pages."""

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
    """Each query head ranks the pages, the mass of the ranks is estimated from a few exact ones by a fit a / x + b, and
    the pages that reach `mass` of the estimated total are read, for the query heads of a KV head together. `budget` is
    the most that a step reads; `vllm_ext:capped_rows` counts lists that it cut short.

    `centroids` = "page_mean" ranks by the logit of a page's mean key. "kmeans" keeps a mean key and a count for each of
    a page's page_size / cluster_size clusters and ranks by `sum_c count_c exp(q . centroid_c)`, a lower bound of the
    page's mass and no lower than its mean key's. Records are made when a page is complete; ranking by them reads
    1 / (2 cluster_size) of the cache, by mean keys 1 / (2 page_size).

    The paper clusters the whole prompt with K-means when it ends, 16 keys a cluster from a random start, ranks the
    clusters and reads their single keys. Here clusters end at the page, for what a kernel reads is a page and what the
    prefix cache shares must depend on its own keys, and start at the keys farthest apart. Clusters across pages would
    gather similar keys from all over the prompt; groups of neighbours need more keys for the same mass (the paper's
    ablation). Where the fitted curve starts and ends is not in the paper: `exact` and `sample`, in all about 2.5 % of
    the keys.
    """

    name: ClassVar[str] = "tactic"
    index: ClassVar[Literal["mean"]] = "mean"
    score: ClassVar[Literal["dot"]] = "dot"
    paper_values: ClassVar[Mapping[str, Any]] = {
        "page_size": "single keys", "budget": "unlimited", "centroids": "kmeans across pages",
    }  # fmt: skip

    budget: int = option(8192, "most keys read per query and KV head in a sparse step", unit="tokens", minimum=16)
    dense_below: int | None = option(2048, "requests up to this length are exact", unit="tokens", minimum=0)
    mass: float = option(0.9, "share of the attention mass that is read", minimum=0, maximum=1)
    exact: float = option(0.02, "share of the best pages whose mass is computed, not fitted", minimum=0, maximum=1)
    sample: float = option(0.0025, "share of the pages in each of the two segments of the fit", minimum=0, maximum=0.1)
    centroids: str = option(
        "page_mean", "what ranks a page: its mean key, or clusters of its keys", choices=("page_mean", "kmeans")
    )
    cluster_size: int = option(16, "keys of a cluster on average (kmeans)", unit="tokens", choices=(8, 16, 32))
    iterations: int = option(10, "rounds of K-means at most (kmeans)", minimum=1, maximum=100)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mass <= 0:
            raise ConfigError(f"tactic.mass must be above 0, got {self.mass}.")
        if self.centroids == "kmeans" and self.page_size < 2 * self.cluster_size:
            raise ConfigError(
                f"tactic.centroids is kmeans, but pages of {self.page_size} hold no two clusters of "
                f"{self.cluster_size}; raise page_size or lower cluster_size."
            )

    @property
    def clusters(self) -> int:
        """Clusters of a page, 0 = its mean key alone."""
        return self.page_size // self.cluster_size if self.centroids == "kmeans" else 0

    def record_elements(self, head_size: int) -> int:
        """The mean key, or a row for each cluster and one for the counts."""
        return (self.clusters + 1) * head_size

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
