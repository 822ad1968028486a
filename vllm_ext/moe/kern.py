"""KERN: ReLU and an L2 norm in place of the softmax (arXiv 2509.25913)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_ext.moe.method import LayerFacts, MoEMethod, Routing
from vllm_ext.options import ConfigError, option

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Kern(MoEMethod):
    """Weights `gamma * relu(s / (||s||_2 + eps))` of the gate logits s; the K largest, no renormalisation.

    Meant for models trained with it. On a model trained with a softmax it changes the scale of the routed output;
    `sum_to_one` keeps that scale where the model's own weights sum to 1.
    """

    name: ClassVar[str] = "kern"
    routes: ClassVar[bool] = True

    gamma: tuple[float, ...] = option([1.0], "scale of the weights: one number, or one for each layer of the model")
    eps: float = option(1e-6, "added to the norm", minimum=0)
    sum_to_one: bool = option(False, "scale the kept weights of a token to sum 1 (not in the paper)")

    def check(self, vllm_config: Any) -> None:
        """See MoEMethod; also one gamma for each layer."""
        super().check(vllm_config)
        layers = vllm_config.model_config.get_total_num_hidden_layers()
        if len(self.gamma) not in (1, layers):
            raise ConfigError(
                f"kern.gamma has {len(self.gamma)} numbers; give one, or {layers} for this model's layers."
            )

    def banner(self, vllm_config: Any) -> dict[str, str]:
        """See MoEMethod."""
        note = "kept" if self.sum_to_one else "changed, unless the model was trained with KERN"
        return super().banner(vllm_config) | {"scale of the routed output": note}

    def routing(self, layer: LayerFacts) -> Routing:
        """See MoEMethod."""
        gamma = self.gamma[layer.index] if len(self.gamma) > 1 else self.gamma[0]
        return KernRouting(layer.top_k, gamma, self.eps, self.sum_to_one)


@dataclass
class KernRouting:
    """One layer's router; `width` is K."""

    width: int
    gamma: float
    eps: float
    sum_to_one: bool

    def __call__(self, hidden: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See method.Routing."""
        if logits.is_cuda:
            from vllm_ext.kernels.route_topk import kern
        else:
            from vllm_ext.kernels.reference_routing import kern

        return kern(logits, self.width, self.gamma, self.eps, self.sum_to_one)
