"""SeerAttention-R: a small learned gate chooses the pages (arXiv 2506.08889, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_ext.attention_backends import gate_file
from vllm_ext.attention_backends.artefacts import shipped
from vllm_ext.attention_backends.gate_file import GateFile
from vllm_ext.attention_backends.method import SparseMethod
from vllm_ext.attention_backends.rope import ModelShape, check_rotation, model_shape
from vllm_ext.options import ConfigError, option

if TYPE_CHECKING:
    from vllm_ext.attention_backends.stages import StageDims, Stages


@dataclass(frozen=True)
class Seer(SparseMethod):
    """Gate keys: maximum, minimum and mean of a page's keys before the rotary embedding, projected, normalised and
    rotated to the page's first position. Gate queries: the group's query heads before rotary, projected and normalised.

    A page's score is their product over sqrt(width); the KV head reads its best pages, or those whose softmax share
    exceeds `threshold`, at most `budget` either way. The page that holds the query is always read, no other is forced.
    Rotations are undone from the cached keys and from the query, so the model's code is not touched. Gates come from
    `vllm-ext train seer`; the published ones load as they are.
    """

    name: ClassVar[str] = "seer"
    paper_values: ClassVar[Mapping[str, Any]] = {"budget": 4096}

    dense_layers: tuple[int, ...] = option([], "layers that stay dense")
    sink: int = option(0, "pages at the start that are always read", unit="pages", minimum=0)
    local: int = option(1, "pages at the end that are always read", unit="pages", minimum=1)
    gates: str | None = option(None, "safetensors file of the model's gates; null = those shipped for this model")
    threshold: float = option(0.0, "least softmax share of a page; 0 = always fill the budget", minimum=0, maximum=1)

    def record_elements(self, head_size: int) -> int:
        """One gate key, whole heads; shipped gates are as wide as a head."""
        width = gate_file.read(self.gates).width if self.gates else head_size
        return -(-width // head_size) * head_size

    def file(self, model: ModelShape) -> GateFile:
        """The gates of `model`.

        Raises:
            ConfigError: none are shipped for it, or the file cannot be read.
        """
        path = self.gates or shipped("gates.safetensors", model, lambda p: gate_file.read(p).notes.get("model"))
        if path is None:
            raise ConfigError(
                f"no gates ship for a model with {model}; train them with `vllm-ext train seer` and pass their file as "
                "seer.gates."
            )
        return gate_file.read(path)

    def check(self, vllm_config: Any) -> None:
        """Refuse what the engine cannot serve, and gates of another model or page size."""
        from vllm_ext.attention_backends.limits import windowed_layers

        super().check(vllm_config)
        check_rotation(vllm_config.model_config.hf_text_config, vllm_config.model_config.quantization)
        model = model_shape(vllm_config.model_config.hf_text_config)
        windowed = windowed_layers(vllm_config)
        layers = [i for i, w in enumerate(windowed) if not w and i not in self.dense_layers]
        self.file(model).check(model, self.page_size, layers)

    def banner(self, vllm_config: Any) -> dict[str, str]:
        """Rows of the start-up banner."""
        file = self.file(model_shape(vllm_config.model_config.hf_text_config))
        rows = super().banner(vllm_config)
        return {**rows, "gates": f"{file.path} ({file.width} channels)"}

    def stages(self, dims: StageDims) -> Stages:
        """Gate queries, then the shared selection over gate keys."""
        from vllm_ext.attention_backends.seer_stages import SeerStages

        return SeerStages(self, dims)
