"""The vLLM names that KV-cache managers rely on; part of `hooks.TABLE`."""

from __future__ import annotations

from vllm_ext.probes import Hook, has, row, sets, takes

_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
_SPEC = "vllm.v1.kv_cache_interface:FullAttentionSpec"
_REGISTRY = "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry"
_LOOKUP = ["block_hashes", "max_length", "kv_cache_group_ids", "block_pool", "kv_cache_spec"]
_SKIP = ["request_id", "processed_computed_tokens", "num_prompt_tokens"]


ROWS: tuple[Hook, ...] = (
    row(takes, f"{_REGISTRY}.register", "finds our manager", ["kvcache_spec_cls", "manager_class"]),
    row(takes, f"{_REGISTRY}._ensure_registered", "stock specs first", []),
    row(takes, f"{_SPEC}.merge", "the spec of a group", ["specs"]),
    row(takes, f"{_SPEC}.max_memory_usage_bytes", "memory that one request needs", ["vllm_config"]),
    row(takes, f"{_SPEC}.is_uniform_with_collection", "budgets apart", ["kv_cache_specs"]),
    row(takes, f"{_MANAGER}.find_longest_cache_hit", "prefix hits, capped", _LOOKUP),
    row(takes, f"{_MANAGER}.cache_blocks", "what enters the prefix cache", ["request", "num_tokens"]),
    row(takes, f"{_MANAGER}.remove_skipped_blocks", "frees the blocks of evicted tokens", _SKIP),
    row(takes, f"{_MANAGER}._remove_blocks_in_range", "the same", ["request_id", "first_block", "last_block"]),
    row(takes, f"{_MANAGER}.pop_blocks_for_free", "forgets a request", ["request_id"]),
    row(sets, _MANAGER, "admission", ["max_admission_blocks_per_request", "block_pool", "block_size"]),
    row(sets, "vllm.v1.request:Request", "preempted requests take no hits", ["skip_reading_prefix_cache"]),
    row(has, "vllm.v1.attention.backend:CommonAttentionMetadata", "rows of a step", ["req_idx", "max_seq_len"]),
    row(
        takes,
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build_for_cudagraph_capture",
        "what a graph records",
        ["common_attn_metadata"],
    ),
    row(
        takes,
        "vllm.v1.attention.backend:AttentionImpl.process_weights_after_loading",
        "query windows, before memory is profiled",
        ["act_dtype"],
    ),
    row(
        sets,
        "vllm.v1.worker.gpu.states:RequestState",
        "requests of runner V2",
        ["index_to_req_id", "req_id_to_index", "prompt_len"],
    ),
    row(sets, "vllm.v1.worker.gpu_model_runner:GPUModelRunner", "requests of runner V1", ["input_batch", "requests"]),
    row(sets, "vllm.v1.worker.gpu_input_batch:InputBatch", "the same", ["num_prompt_tokens"]),
    row(takes, "vllm.v1.worker.gpu_model_runner:GPUModelRunner.get_model", "output projections"),
    row(takes, "vllm.v1.worker.gpu_worker:Worker.determine_available_memory", "memory left for the cache", []),
    row(takes, "vllm.utils.math_utils:cdiv", "blocks of tokens", ["a", "b"]),
    row(has, "vllm.config:VllmConfig", "tokens in flight", ["max_in_flight_tokens", "device_config"]),
)
