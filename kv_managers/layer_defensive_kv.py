"""Layer-DefensiveKV: DefensiveKV with more budget for layers that need it (Feng et al., ICLR 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_ext.kv_managers import layer_profile
from vllm_ext.kv_managers.defensive_kv import DefensiveKV
from vllm_ext.options import option


@dataclass(frozen=True)
class LayerDefensiveKV(DefensiveKV):
    """Layers are sorted into classes of equally many; each class keeps its share of the budget, as `profile` says.

    The paper takes the best tokens of all layers of a prompt together. Here how many stay must not depend on the
    prompt, so the layers' shares are measured once, over texts, with the same scores (`vllm-ext train layers`).
    """

    name: ClassVar[str] = "layer_defensive_kv"

    profile: str = option(
        "", "file of `vllm-ext train layers`: the layers' shares of the budget; or the name of a shipped one"
    )

    def layer_shares(self, layers: int) -> list[float]:
        return layer_profile.load(self.profile).for_layers(layers)

    def check(self, vllm_config: Any) -> None:
        layer_profile.load(self.profile).check_model(vllm_config.model_config.hf_text_config)
        super().check(vllm_config)
