"""Token rounding: every expert gets a multiple of the kernel's tile of tokens (SonicMoE, arXiv 2512.14080)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_ext.moe.method import LayerFacts, MoEMethod, Routing
from vllm_ext.options import ConfigError, option

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TokenRounding(MoEMethod):
    """Rounds the tokens of each expert to whole tiles in large batches; smaller ones keep the model's router.

    What a token gets then depends on the other tokens of its batch, later ones of its own prompt included: outputs are
    not reproducible across batches. The authors round in training and evaluate without it. Rows are saved only with an
    experts kernel that skips empty columns (`sonic_moe`).
    """

    name: ClassVar[str] = "token_rounding"
    routes: ClassVar[bool] = True

    tile: int = option(128, "rows of the experts kernel's tile", unit="tokens", choices=(16, 32, 64, 128, 256))
    mode: str = option("nearest", "to which multiple", choices=("nearest", "up", "down"))
    extra: int = option(3, "experts a token may get beyond the model's K", minimum=0, maximum=16)
    fill: float = option(
        2.0, "rounds batches that give an expert at least that many tiles on average", unit="tiles", minimum=0
    )

    def check(self, vllm_config: Any) -> None:
        """See MoEMethod; also refuses what needs K experts a token, or answers that do not depend on the batch."""
        super().check(vllm_config)
        if vllm_config.model_config.quantization is not None:
            raise ConfigError(
                f"--plugins token_rounding gives tokens a variable number of experts, which kernels of "
                f"{vllm_config.model_config.quantization} experts may not take; drop the plugin."
            )
        if vllm_config.aux_output_config.enabled:
            raise ConfigError(
                "--plugins token_rounding gives tokens a variable number of experts, which "
                "--enable-return-routed-experts cannot return; drop one of them."
            )
        if vllm_config.speculative_config is not None:
            raise ConfigError(
                "--plugins token_rounding makes outputs depend on the batch, so speculative decoding would not be "
                "exact; drop --speculative-config or the plugin."
            )

    def banner(self, vllm_config: Any) -> dict[str, str]:
        """See MoEMethod."""
        model = vllm_config.model_config
        tokens = first_rounded(self.tile, self.fill, model.get_num_experts(), model.get_num_experts_per_tok())
        return super().banner(vllm_config) | {
            "rounds": f"batches of at least {tokens} tokens",
            "note": "outputs depend on the other requests of a batch",
        }

    def routing(self, layer: LayerFacts) -> Routing:
        """See MoEMethod."""
        return RoundedRouting(self, layer)


def first_rounded(tile: int, fill: float, num_experts: int, top_k: int) -> int:
    """Smallest number of tokens that gives an expert `fill` tiles on average."""
    return max(1, -int(-fill * tile * num_experts // top_k))


class RoundedRouting:
    """One layer's router."""

    def __init__(self, plugin: TokenRounding, layer: LayerFacts) -> None:
        self.plugin, self.layer = plugin, layer
        self.width = min(layer.top_k + plugin.extra, layer.num_experts)
        self.first = first_rounded(plugin.tile, plugin.fill, layer.num_experts, layer.top_k)

    def __call__(self, hidden: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See method.Routing; the model's own router serves small batches."""
        from vllm_ext.kernels.reference_routing import token_rounding

        if len(logits) < self.first:
            return None
        p, layer = self.plugin, self.layer
        return token_rounding(logits, layer.top_k, layer.renormalize, p.tile, p.mode, p.extra)
