"""DirMoE: which experts and how much of each are decided apart (arXiv 2602.09001)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_ext.moe.method import LayerFacts, MoEMethod, Routing
from vllm_ext.options import ConfigError, option

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DirMoE(MoEMethod):
    """Bernoulli gates times Dirichlet weights, without their noise: `z = sigmoid(s / tau)` and the Dirichlet's mean.

    The paper trains with both kinds of noise and gives no rule for serving; this one is the limit of its formulas. Its
    two heads of concentrations come from `heads`; without that file they are constants that put `mass` on K open gates.
    """

    name: ClassVar[str] = "dirmoe"
    routes: ClassVar[bool] = True

    tau: float = option(1.0, "temperature of the gates", minimum=1e-3)
    threshold: float | None = option(
        None,
        "use only experts whose gate is open wider, the best one always; null = the model's K",
        minimum=0,
        maximum=1,
    )
    mass: float = option(0.9, "share of the weight that open gates expect, where there are no heads", minimum=0.01)
    heads: str | None = option(None, "safetensors file with the heads of the concentrations")
    floor: float = option(1e-3, "least concentration", minimum=1e-6)

    def __post_init__(self) -> None:
        if self.mass >= 1:
            raise ConfigError(f"dirmoe.mass must be below 1, got {self.mass}.")

    def check(self, vllm_config: Any) -> None:
        """See MoEMethod; also reads the names and shapes of `heads`."""
        super().check(vllm_config)
        model = vllm_config.model_config
        if self.heads is not None:
            shape = (model.get_num_experts(), model.get_hidden_size())
            check_heads(Path(self.heads), shape)

    def routing(self, layer: LayerFacts) -> Routing:
        """See MoEMethod."""
        return DirMoERouting(self, layer)


def check_heads(path: Path, shape: tuple[int, int]) -> None:
    """Raise ConfigError unless `path` holds `layers.<i>.high.weight` and `layers.<i>.low.weight` of this shape."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="np") as stream:
            found = {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises types of its own
        raise ConfigError(f"dirmoe.heads '{path}' cannot be read ({error}); give a safetensors file.") from None
    wrong = [n for n, s in found.items() if not n.endswith((".high.weight", ".low.weight")) or s != shape]
    if wrong or not found:
        what = f"tensor {wrong[0]} of shape {list(found[wrong[0]])}" if wrong else "no tensor"
        raise ConfigError(
            f"dirmoe.heads '{path}' holds {what}; it must hold layers.<i>.high.weight and layers.<i>.low.weight "
            f"of shape {list(shape)}."
        )


class DirMoERouting:
    """One layer's router; `width` is K."""

    def __init__(self, plugin: DirMoE, layer: LayerFacts) -> None:
        from vllm_ext.kernels.reference_routing import concentration_ratio

        self.plugin, self.width = plugin, layer.top_k
        self.ratio = concentration_ratio(plugin.mass, layer.num_experts, layer.top_k)
        self.weight = self._heads(layer) if plugin.heads else None

    def _heads(self, layer: LayerFacts) -> torch.Tensor:
        """[2E, d] on the layer's device: the high head, then the low one."""
        import torch
        from safetensors import safe_open

        names = [f"layers.{layer.index}.{kind}.weight" for kind in ("high", "low")]
        with safe_open(str(self.plugin.heads), framework="pt") as stream:
            missing = [n for n in names if n not in stream.keys()]  # noqa: SIM118
            if missing:
                raise ConfigError(f"dirmoe.heads '{self.plugin.heads}' has no {missing[0]}; export every MoE layer.")
            return torch.cat([stream.get_tensor(n) for n in names]).to(layer.device, layer.dtype)

    def __call__(self, hidden: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See method.Routing."""
        import torch

        from vllm_ext.kernels import reference_routing

        p = self.plugin
        heads = None if self.weight is None else hidden @ self.weight.T
        if logits.is_cuda:
            from vllm_ext.kernels.route_topk import dirmoe

            return dirmoe(logits, self.width, p.tau, heads, p.floor, self.ratio, p.threshold)
        high, low = self.ratio, 1.0
        if heads is not None:
            high, low = (torch.nn.functional.softplus(heads.float()) + p.floor).chunk(2, dim=-1)
        return reference_routing.dirmoe(logits, self.width, p.tau, high, low, p.threshold)
