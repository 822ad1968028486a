"""The rotary embedding of a model as plain numbers: what seer undoes, and what says whose gates a file holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_ext.options import ConfigError

KINDS = ("default", "linear", "llama3")
"""Rotations by fixed frequencies, which `inverse_frequencies` works out."""
MODELS = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3", "granite", "olmo2", "gemma",
)  # fmt: skip
"""Model types known to turn channel c with channel c + half in every layer; others pair neighbours or skip layers."""
_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class ModelShape:
    """What a file trained for a model must agree with: its attention, not its weights.

    Attributes:
        layers, heads, kv_heads, head_size: of the whole model.
        rope: kind, theta, share of the channels that turn, and the numbers of a scaled kind.
    """

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    rope: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.heads // self.kv_heads

    def to_json(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, {self.kv_heads} KV heads, group {self.group}, head size {self.head_size}, "
            f"rope {self.rope.get('kind')} {self.rope.get('theta'):g}"
        )


def model_shape(hf: Any) -> ModelShape:
    """The shape from a Hugging Face (text) configuration."""
    heads = hf.num_attention_heads
    size = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    kv_heads = getattr(hf, "num_key_value_heads", None) or heads
    return ModelShape(hf.num_hidden_layers, heads, kv_heads, size, rope_parameters(hf))


def rope_parameters(hf: Any) -> dict[str, Any]:
    """Kind, theta (0: unknown), share and scaling numbers of the model's rotary embedding."""
    raw = dict(getattr(hf, "rope_parameters", None) or {})
    raw |= {k: v for k, v in (getattr(hf, "rope_scaling", None) or {}).items() if k not in raw}
    theta = raw.get("rope_theta", getattr(hf, "rope_theta", None))
    kind = raw.get("rope_type", raw.get("type", "default"))
    kind = "mrope" if raw.get("mrope_section") else kind
    share = raw.get("partial_rotary_factor", getattr(hf, "partial_rotary_factor", None)) or 1.0
    found = {"kind": kind, "theta": float(theta or 0), "share": float(share)}
    return found | ({k: float(raw[k]) for k in _NUMBERS if k in raw} if kind != "default" else {})


def check_rotation(hf: Any, quantization: str | None = None) -> None:
    """Raise ConfigError unless the model's rotation can be undone from its configuration alone.

    Args:
        quantization: vLLM's; weights from GGUF pair neighbouring channels.
    """
    rope = rope_parameters(hf)
    if rope["kind"] not in KINDS or not rope["theta"]:
        raise ConfigError(
            f"seer cannot undo the rotary embedding of this model ('{rope['kind']}'), only {', '.join(KINDS)}; choose "
            "another plugin."
        )
    if hf.model_type not in MODELS or quantization == "gguf":
        what = "GGUF weights" if quantization == "gguf" else f"model type '{hf.model_type}'"
        raise ConfigError(f"seer does not support {what}, only {', '.join(MODELS)}; choose another plugin.")


def inverse_frequencies(rope: Mapping[str, Any], size: int) -> list[float]:
    """Radians a position for each pair of channels of a head of `size` channels: int(size * share) / 2 numbers."""
    turning = int(size * rope["share"])
    base = [rope["theta"] ** (-2 * i / turning) for i in range(turning // 2)]
    if rope["kind"] == "linear":
        return [f / rope["factor"] for f in base]
    return [_llama3(f, rope) for f in base] if rope["kind"] == "llama3" else base


def _llama3(f: float, rope: Mapping[str, Any]) -> float:
    """Slow frequencies are divided by `factor`, fast ones stay, those between are blended (Llama 3.1)."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] * f / (2 * math.pi)
    share = min(1.0, max(0.0, (turns - low) / (high - low)))
    return share * f + (1 - share) * f / factor
