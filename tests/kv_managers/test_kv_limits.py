"""What is refused before weights load: one sentence that names the option and the remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ext.config import expand
from vllm_ext.options import ConfigError


@pytest.mark.parametrize(
    ("plugin", "options", "sentence"),
    [
        ("snapkv", {"budget": 32}, "snapkv.budget is 32 tokens, but sinks and window alone hold 36"),
        ("snapkv", {"ratio": 0.0}, "snapkv.ratio must be above 0 and at most 1, got 0.0."),
        ("snapkv", {"ratio": 1.5}, "snapkv.ratio must be at most 1, got 1.5."),
        ("snapkv", {"ratio": None}, "snapkv needs a budget; set snapkv.budget (tokens) or snapkv.ratio"),
        ("snapkv", {"budget": 100}, "snapkv.budget must be a multiple of snapkv.block_size (32), got 100."),
        ("r_kv", {"stride": 100}, "r_kv.stride must be a multiple of r_kv.block_size (32), got 100."),
        ("streaming_llm", {"budget": None}, "streaming_llm evicts inside the prompt and needs a fixed"),
        (
            "snapkv",
            {"budget": 64, "ratio": 0.5},
            "snapkv takes a budget or a ratio, but snapkv.budget is 64 and snapkv.ratio",
        ),
        ("r_kv", {"ratio": 0.3}, "r_kv.budget is 1024 and r_kv.ratio 0.3; set one of them to null."),
        ("snapkv", {"scope": "token"}, "snapkv.scope must be one of head, layer, model"),
    ],
)
def test_bad_options(plugin: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        expand([plugin], {plugin: options})
    assert sentence in str(error.value)


@pytest.mark.parametrize("others", [["snapkv", "r_kv"], ["snapkv", "quest"], ["streaming_llm", "streaming"]])
def test_one_manager_at_a_time(others: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"'{others[0]}' and '{others[1]}' exclude each other"):
        expand(others)


def config(**changes: Any) -> Any:
    """The parts of a VllmConfig that the checks read; `a__b` changes `a.b`."""
    hf = SimpleNamespace(model_type="llama", layer_types=None)
    model = SimpleNamespace(
        runner_type="generate", is_attention_free=False, is_encoder_decoder=False, use_mla=False, model="m",
        hf_text_config=hf, quantization=None, dtype="torch.bfloat16", get_sliding_window=lambda: None,
        get_total_num_kv_heads=lambda: 8, get_total_num_hidden_layers=lambda: 4, max_model_len=4096,
    )  # fmt: skip
    cfg = SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(block_size=32, cache_dtype="auto"),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, decode_context_parallel_size=1, tensor_parallel_size=1, enable_dbo=False
        ),
        speculative_config=None,
        kv_transfer_config=None,
        hf=hf,
    )
    for name, value in changes.items():
        owner, _, field = name.rpartition("__")
        setattr(getattr(cfg, owner) if owner else cfg, field, value)
    return cfg


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"speculative_config": object()}, "--speculative-config"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"model_config__use_mla": True}, "does not support MLA models"),
        ({"hf__layer_types": ["full_attention", "sliding_attention"]}, "sliding-window or other non-full-attention"),
        ({"hf__layer_types": ["linear_attention", "full_attention"]}, "sliding-window or other non-full-attention"),
        ({"model_config__get_sliding_window": lambda: 4096}, "sliding-window"),
        ({"cache_config__block_size": 64}, "snapkv.block_size is 32 but --block-size is 64"),
        ({"cache_config__cache_dtype": "fp8"}, "--kv-cache-dtype fp8; use auto"),
        ({"parallel_config__pipeline_parallel_size": 2}, "--pipeline-parallel-size 1"),
        ({"parallel_config__decode_context_parallel_size": 2}, "--decode-context-parallel-size 1"),
        ({"parallel_config__tensor_parallel_size": 16}, "--tensor-parallel-size of at most 8"),
        ({"model_config__runner_type": "pooling"}, "needs a decoder"),
        ({"hf__model_type": "gpt_oss"}, "attention sinks"),
    ],
)
def test_refusals(changes: dict[str, Any], sentence: str) -> None:
    plugin = expand(["snapkv"]).plugins["snapkv"]
    plugin.check(config())
    with pytest.raises(ConfigError) as error:
        plugin.check(config(**changes))
    text = str(error.value)
    assert sentence in text
    assert "snapkv" in text
    assert text.endswith(".")
    assert "\n" not in text


def test_scopes_that_mix_heads_refuse_tensor_parallelism() -> None:
    plugin = expand(["snapkv"], {"snapkv": {"scope": "layer"}}).plugins["snapkv"]
    with pytest.raises(ConfigError, match=r"snapkv.scope layer mixes heads"):
        plugin.check(config(parallel_config__tensor_parallel_size=2))
