"""The vLLM names that `sonic_moe`, `moe tune` and `bench moe` rely on; part of `hooks.TABLE`."""

from __future__ import annotations

from vllm_ext.probes import Hook, has, row, takes

_MOE = "vllm.model_executor.layers.fused_moe"
_FUSED = f"{_MOE}.fused_moe"
_LAUNCH = [
    *("A", "B", "C", "A_scale", "B_scale", "topk_weights", "sorted_token_ids", "expert_ids", "num_tokens_post_padded"),
    *("mul_routed_weight", "top_k", "config", "compute_type", "per_channel_quant"),
]


ROWS: tuple[Hook, ...] = (
    row(takes, f"{_FUSED}:get_config_file_name", "where tuned tiles are looked for", ["E", "N", "dtype"]),
    row(takes, f"{_FUSED}:get_moe_configs", "reads tuned tiles", ["E", "N", "dtype"]),
    row(takes, f"{_FUSED}:get_default_config", "tiles without a file", ["M", "E", "N", "K", "topk", "dtype"]),
    row(takes, f"{_FUSED}:invoke_fused_moe_triton_kernel", "compiled while tiles are searched", _LAUNCH),
    row(takes, f"{_MOE}:override_config", "tiles under trial", ["config"]),
    row(takes, "vllm.platforms:current_platform.get_device_name", "the GPU of a table of tiles"),
    row(takes, "vllm.platforms:current_platform.has_device_capability", "Hopper or later", ["capability"]),
    row(has, "vllm.config:ParallelConfig", "ranks that cut an expert", ["enable_expert_parallel"]),
)
