"""Which model a file was made for: retention gates, thought thresholds and layer profiles fit one model each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_ext.options import ConfigError

KEYS = (
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip
"""Keys of a Hugging Face configuration that must be those of the model that a file was made for."""


def fingerprint(config: Any) -> dict[str, Any]:
    """What identifies a model, from its Hugging Face (text) configuration or config.json."""
    get = config.get if isinstance(config, Mapping) else lambda k, d=None: getattr(config, k, d)
    found = {k: get(k, None) for k in KEYS}
    found["head_dim"] = found["head_dim"] or found["hidden_size"] // found["num_attention_heads"]
    return found


def check_fingerprint(model: Mapping[str, Any], config: Any, what: str, remedy: str) -> None:
    """Raise ConfigError if `model`, a file's fingerprint, is not that of this configuration.

    Args:
        what: beginning of the sentence, "<option> was trained on".
        remedy: its end.
    """
    here = fingerprint(config)
    wrong = [f"{k} {model.get(k)} (model: {here[k]})" for k in KEYS if model.get(k) != here[k]]
    if wrong:
        raise ConfigError(f"{what} another model: {', '.join(wrong)}; {remedy}.")
