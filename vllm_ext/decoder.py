"""Which models the plugins that replace the attention backend refuse."""

from __future__ import annotations

from typing import Any

from vllm_ext.options import ConfigError


def check_decoder(plugin: str, model: Any) -> None:
    """Refuse what is no decoder with plain paged attention.

    Args:
        plugin: name, for the sentence.
        model: `VllmConfig.model_config`.

    Raises:
        ConfigError: not generative, without attention, encoder-decoder, MLA, logits soft cap, ALiBi or attention sinks.
    """
    if model.runner_type != "generate" or model.is_attention_free or getattr(model, "is_encoder_decoder", False):
        raise ConfigError(
            f"--plugins {plugin} needs a decoder with paged full attention, which {model.model} is not; "
            "drop the plugin."
        )
    if model.use_mla:
        raise ConfigError(f"--plugins {plugin} does not support MLA models such as {model.model}; drop the plugin.")
    hf = model.hf_text_config
    soft = {"attn_logit_softcapping": "logits soft cap", "alibi": "ALiBi"}
    found = [text for key, text in soft.items() if getattr(hf, key, None)]
    found += ["ALiBi"] if hf.model_type in ("bloom", "mpt") else []
    found += ["attention sinks"] if hf.model_type == "gpt_oss" else []
    if found:
        raise ConfigError(
            f"--plugins {plugin} does not support models with {found[0]} such as {model.model}; drop the plugin."
        )
