"""The vLLM names that `sonic_moe`, `moe tune` and `bench moe` rely on; part of `hooks.TABLE`."""

from __future__ import annotations

from functools import partial

from vllm_ext.probes import Hook, has, takes

_MOE = "vllm.model_executor.layers.fused_moe"
_FUSED = f"{_MOE}.fused_moe"
_LAUNCH = [
    *("A", "B", "C", "A_scale", "B_scale", "topk_weights", "sorted_token_ids", "expert_ids", "num_tokens_post_padded"),
    *("mul_routed_weight", "top_k", "config", "compute_type", "per_channel_quant"),
]


def _row(probe, name: str, use: str, *args) -> Hook:
    return Hook(name, use, partial(probe, name, *args))


ROWS: tuple[Hook, ...] = (
    _row(takes, f"{_FUSED}:get_config_file_name", "where tuned tiles are looked for", ["E", "N", "dtype"]),
    _row(takes, f"{_FUSED}:get_moe_configs", "reads tuned tiles", ["E", "N", "dtype"]),
    _row(takes, f"{_FUSED}:get_default_config", "tiles without a file", ["M", "E", "N", "K", "topk", "dtype"]),
    _row(takes, f"{_FUSED}:invoke_fused_moe_triton_kernel", "compiled while tiles are searched", _LAUNCH),
    _row(takes, f"{_MOE}:override_config", "tiles under trial", ["config"]),
    _row(takes, "vllm.platforms:current_platform.get_device_name", "the GPU of a table of tiles"),
    _row(takes, "vllm.platforms:current_platform.has_device_capability", "Hopper or later", ["capability"]),
    _row(has, "vllm.config:ParallelConfig", "ranks that cut an expert", ["enable_expert_parallel"]),
)
