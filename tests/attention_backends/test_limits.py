"""Every refusal of the sparse engine: one sentence that names an option and a remedy, before any weight is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vllm_ext.options import ConfigError

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 4096, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "group of 32": {"num_attention_heads": 32, "num_key_value_heads": 1},
    "long": {"max_position_embeddings": 1 << 20},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64},
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 32, "sliding_window": 64,
    },
    "bloom": {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_head": 4, "n_layer": 4},
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_local_experts": 4,
        "num_experts_per_tok": 2, "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "deepseek": {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "kv_lora_rank": 32,
        "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 4,
        "num_key_value_heads": 4, "head_dim": 16, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
    },
    "mamba": {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "state_size": 16, "conv_kernel": 4,
        "expand": 2, "time_step_rank": 8, "use_bias": False, "use_conv_bias": True,
    },
}  # fmt: skip
NGRAM = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": {}}


def directory(path: Path, name: str) -> str:
    """A model directory that is enough to build a VllmConfig."""
    out = path / name.replace(" ", "-")
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({**LLAMA, **OTHERS[name]}))
    return str(out)


def build(path: Path, name: str, options: dict[str, Any], args: dict[str, Any]) -> Any:
    """The VllmConfig of a model under Quest, as `vllm serve` makes it before it loads weights."""
    from vllm.engine.arg_utils import EngineArgs

    import vllm_ext

    ours = vllm_ext.engine_args("quest", quest={"page_size": 32} | options)
    return EngineArgs(
        **{"model": directory(path, name), "skip_tokenizer_init": True} | ours | args
    ).create_engine_config()


# what is wrong: model, options of quest, engine arguments, what the sentence must say
REFUSED = {
    "TP above KV heads": ("llama", {}, {"tensor_parallel_size": 4}, "--tensor-parallel-size of at most 2"),
    "fp8 cache": ("llama", {}, {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8; use auto"),
    "fp8 cache, e5m2": ("llama", {}, {"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2; use auto"),
    "int8 cache": ("llama", {}, {"kv_cache_dtype": "int8_per_token_head"}, "int8_per_token_head; use auto"),
    "block size": ("llama", {}, {"block_size": 64}, "block_size=32.*64; use --plugins quest"),
    "page size on CPUs": ("llama", {"page_size": 16}, {}, "quest.page_size must be a multiple of 32 .* use 32"),
    "no such layer": ("llama", {"dense_layers": [0, 4]}, {}, "quest.dense_layers names layer 4, .* 0 to 3"),
    "negative layer": ("llama", {"dense_layers": [-1]}, {}, "quest.dense_layers names layer -1, .* 0 to 3"),
    "all layers dense": ("llama", {"dense_layers": [0, 1, 2, 3]}, {}, "quest.dense_layers .* leave at least one"),
    "budget": ("llama", {"budget": 96}, {}, "quest.budget is 96 .* need 128; raise budget"),
    "budget with sinks": ("llama", {"budget": 256, "sink": 6}, {}, "quest.budget is 256 .* need 288; .* lower sink"),
    "MLA": ("deepseek", {}, {}, "--plugins quest does not support MLA .*; drop the plugin"),
    "soft cap": ("gemma2", {}, {}, "--plugins quest does not support models with logits soft cap .*; drop the plugin"),
    "ALiBi": ("bloom", {}, {}, "--plugins quest does not support models with ALiBi .*; drop the plugin"),
    "sinks": ("gpt_oss", {}, {}, "--plugins quest does not support models with attention sinks .*; drop the plugin"),
    "no attention": ("mamba", {}, {}, "--plugins quest needs a decoder with paged full attention.*; drop the plugin"),
    "pooling": ("llama", {}, {"runner": "pooling"}, "--plugins quest needs a decoder .*; drop the plugin"),
    "windows everywhere": ("mistral", {}, {}, "--plugins quest: every layer .* sliding window; drop the plugin"),
    "connector": ("llama", {}, {"kv_transfer_config": CONNECTOR}, "cannot be used with --kv-transfer-config"),
    "drafts": (
        "llama", {}, {"speculative_config": {**NGRAM, "num_speculative_tokens": 8}},
        "up to 7 draft tokens a step, --speculative-config asks for 8",
    ),
    "group": ("group of 32", {}, {}, "--plugins quest supports up to 16 query heads a KV head, the model has 32"),
    "pages": ("long", {}, {}, "--max-model-len 1048576 is more than 16384 pages of 32 .* raise quest.page_size"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path: Path, case: str) -> None:
    name, options, args, pattern = REFUSED[case]
    if "kv_transfer_config" in args:
        from vllm.config import KVTransferConfig

        args = {"kv_transfer_config": KVTransferConfig(**args["kv_transfer_config"])}
    with pytest.raises(ConfigError, match=pattern) as caught:
        build(tmp_path, name, options, args)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert not sentence.endswith("..")
    assert "\n" not in sentence
    assert len(re.findall(r"[.!?] [A-Z]", sentence)) == 0, "one sentence"
    assert re.search(r"--[a-z]|quest\.[a-z]", sentence), "names an option"


ACCEPTED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {}),
    "cache dtype of the model": ("llama", {}, {"kv_cache_dtype": "bfloat16"}),
    "TP up to the KV heads": ("llama", {}, {"tensor_parallel_size": 2}),
    "budget that just fits": ("llama", {"budget": 128}, {}),
    "seven drafts": ("llama", {}, {"speculative_config": {**NGRAM, "num_speculative_tokens": 7}}),
    "one sparse layer": ("llama", {"dense_layers": [0, 1, 2]}, {}),
    "pages that just fit": ("long", {"page_size": 64}, {}),
    "long model, shorter limit": ("long", {}, {"max_model_len": 524288}),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_just_inside_the_limits(tmp_path: Path, case: str) -> None:
    config = build(tmp_path, *ACCEPTED[case])
    assert config.attention_config.backend.name == "VLLM_EXT_SPARSE"


def test_each_platform_refuses_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules for GPUs, asked of a configuration made on a CPU: head size and dtype."""
    from vllm.platforms import current_platform

    from vllm_ext.attention_backends.limits import check
    from vllm_ext.attention_backends.quest import Quest

    config = build(tmp_path, "llama", {}, {"dtype": "float32"})
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(ConfigError, match=r"needs a head size of 64, .* has 32\.$"):
        check(Quest(page_size=32), config)
    monkeypatch.setattr(type(config.model_config), "get_head_size", lambda self: 64)
    with pytest.raises(ConfigError, match=r"needs --dtype bfloat16 or float16 on a GPU, not torch\.float32\.$"):
        check(Quest(page_size=32), config)


def test_kernel_that_does_not_fit_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 256 with pages of 128 leave room for 32 query rows; see tests/kernels/test_compile.py."""
    from vllm.platforms import current_platform

    from vllm_ext.attention_backends.limits import check
    from vllm_ext.attention_backends.quest import Quest

    quest, options = Quest(page_size=128), {"page_size": 128}
    one, eight = (
        build(tmp_path / str(n), "llama", options, {"speculative_config": {**NGRAM, "num_speculative_tokens": n}})
        for n in (1, 7)
    )
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(one.model_config), "get_head_size", lambda self: 256)
    monkeypatch.setattr(type(one.model_config), "get_num_kv_heads", lambda self, parallel: 0.5)
    check(quest, one)
    with pytest.raises(ConfigError, match=r"^quest\.page_size 128 does not fit a GPU with heads of 256 .*; use 64\.$"):
        check(quest, eight)


def test_banner_says_what_runs(tmp_path: Path) -> None:
    from vllm_ext.attention_backends.limits import banner, check
    from vllm_ext.attention_backends.quest import Quest

    quest = Quest(page_size=32, budget=256)
    config = build(tmp_path, "llama", {"budget": 256}, {})
    check(quest, config)
    rows = banner(quest, config)
    assert rows["layers"] == "2 of 4 sparse, the others dense"
    assert rows["page index"].startswith("3.1%")  # 2 records of one token's K for 32 tokens of K and V
    assert "512 tokens" in rows["exact"]
