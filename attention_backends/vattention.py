"""vAttention: a host's pages, and a sample of the other keys sized for a given error (arXiv 2510.05688, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_ext.attention_backends.hosted import HostedMethod
from vllm_ext.options import ConfigError, option

if TYPE_CHECKING:
    from vllm_ext.attention_backends.stages import StageDims, Stages
    from vllm_ext.kernels.reference_sampling import Target


@dataclass(frozen=True)
class VAttention(HostedMethod):
    """Reads the host's list, and of the keys outside it a uniform sample with weight n / b (Horvitz-Thompson).

    A pilot estimates variances, and the central limit theorem turns them into the number of draws b that keeps the
    relative error below `epsilon` with probability 1 - `delta`: of the softmax denominator, as the authors' code does,
    or of a head's output. The query rows of a KV head share the draws, b is the largest any of them needs (the paper
    has a sample a query head). Draws do not repeat, so b is corrected for a finite tail and b = n is exact. They depend
    on `seed`, position, layer and KV head: not on the batch, nor on the request.

    The guarantee is per head and layer, not end to end, and needs a pilot that sees the tail's large weights: it does
    not hold where the list misses rare keys of large weight.
    """

    name: ClassVar[str] = "vattention"
    paper_values: ClassVar[Mapping[str, Any]] = {"sink": "128 tokens", "local": "128 tokens"}

    epsilon: float = option(0.05, "relative error that the sample keeps", minimum=0, maximum=1)
    delta: float = option(0.05, "probability of a larger error", minimum=0, maximum=1)
    guarantee: str = option("denominator", "whose error epsilon bounds", choices=("denominator", "output"))
    pilot: int = option(80, "draws of the pilot at least", unit="tokens", minimum=2)
    pilot_rate: float = option(0.01, "draws of the pilot as a share of the tail", minimum=0, maximum=1)
    cap: float = option(1.0, "share of the tail that is drawn at most; below 1 it can break the guarantee", maximum=1)
    seed: int = option(0, "seed of the draws", minimum=0, maximum=2**31 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epsilon", "delta", "cap"):
            value = getattr(self, name)
            if value <= 0 or (value >= 1 and name != "cap"):
                bounds = "above 0" if name == "cap" else "between 0 and 1, both excluded"
                raise ConfigError(f"{self.plugin_name()}.{name} must be {bounds}, got {value}.")

    @property
    def target(self) -> Target:
        """What the kernels are given."""
        from vllm_ext.kernels.reference_sampling import Target

        return Target(self.epsilon, self.delta, self.guarantee, self.pilot, self.pilot_rate, self.cap)

    def stages(self, dims: StageDims) -> Stages:
        """Host's list, attention over it, pilot, sample and merge."""
        from vllm_ext.attention_backends.vattention_stages import VAttentionStages

        return VAttentionStages(self, dims)

    def banner(self, vllm_config: Any) -> dict[str, str]:
        """Rows of the engine, and what is promised."""
        text = f"{self.guarantee} within {self.epsilon:.3g} in {1 - self.delta:.3g} of the cases, a head and step"
        return super().banner(vllm_config) | {"guarantee": text}
