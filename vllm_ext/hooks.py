"""Every vLLM name that vllm-ext relies on or rebinds, each with a probe. `vllm-ext doctor` prints the table.

`plugin.register` runs the probes of the names that it is about to rebind, and declines if one fails: serving then goes
on as if vllm-ext were not installed. The other probes import attention code, so only `doctor` runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vllm_ext import hooks_kv, hooks_spec, hooks_tiles
from vllm_ext.hooks_moe import ROWS as _MOE
from vllm_ext.probes import Hook, dotted_flags, equals, has, padding_counts, platform_takes, resolve, row, sets, takes

__all__ = ["TABLE", "VLLM_VERSION", "Hook", "platform_name", "refusal", "resolve", "version_problem"]

VLLM_VERSION = "0.32"
"""The minor version of vLLM that the table describes."""


def _cpu(probe: Callable[..., str], name: str, use: str, *args: Any) -> Hook:
    return row(probe, name, use, *args, platforms=("cpu",))


def _cuda(probe: Callable[..., str], name: str, use: str, *args: Any) -> Hook:
    return row(probe, name, use, *args, platforms=("cuda",))


_ARGS = "vllm.engine.arg_utils:EngineArgs"
_REGISTRY = "vllm.v1.attention.backends.registry:AttentionBackendEnum"
_BACKEND = "vllm.v1.attention.backend"
_CPU = "vllm.v1.attention.backends.cpu_attn"
_FLASH = "vllm.v1.attention.backends.flash_attn"
_BUILDER_ARGS = ["kv_cache_spec", "layer_names", "vllm_config", "device"]
_FORWARD_ARGS = ["layer", "query", "key", "value", "kv_cache", "attn_metadata", "output", "output_scale"]
_UPDATE_ARGS = ["layer", "key", "value", "kv_cache", "slot_mapping"]
_LAYER_FACTS = ["sliding_window", "alibi_slopes", "logits_soft_cap", "sinks", "attn_type"]
_IMPL = ["num_heads", "head_size", "scale", "kv_sharing_target_layer_name", *_LAYER_FACTS]

_GLUE = (
    row(takes, "vllm.plugins:load_general_plugins", "calls plugin.register in every process"),
    row(takes, f"{_ARGS}.add_cli_args", "adds --plugins to the parser", ["parser"], rebound=True),
    row(takes, f"{_ARGS}.__post_init__", "refuses a bad model directory or option early", ["self"], rebound=True),
    row(takes, f"{_ARGS}.create_engine_config", "runs the plugins' checks, prints the banner", ["self"], rebound=True),
    row(
        has,
        _ARGS,
        "engine arguments that plugins set",
        ["model", "additional_config", "attention_backend", "block_size"],
        rebound=True,
    ),
    Hook(
        "vllm.utils.argparse_utils:FlexibleArgumentParser.parse_args",
        "reads dotted --additional-config flags",
        dotted_flags,
    ),
    row(takes, "vllm.logger:init_logger", "log lines and the banner", ["name"], rebound=True),
    row(
        takes,
        f"{_REGISTRY}.register",
        "gives the attention backend its name; pickled by name (copyreg)",
        ["name", "value"],
        rebound=True,
    ),
    row(takes, f"{_REGISTRY}.get_class", "finds the attention backend's class", rebound=True),
    Hook(
        "vllm.platforms:current_platform.get_attn_backend_cls",
        "honours the attention backend's name on CPU too",
        partial(platform_takes, "get_attn_backend_cls", ["selected_backend", "attn_selector_config"]),
        rebound=True,
        platforms=("cpu",),
    ),
)

_WORKERS = (
    row(sets, "vllm.v1.worker.worker_base:WorkerBase", "plugin.attach in each worker", ["vllm_config", "rank"]),
    row(
        has,
        "vllm.v1.worker.worker_base:WorkerBase",
        "trim_kv: gates enter the loaded model, their cache exists before graphs are captured",
        ["load_model", "compile_or_warm_up_model"],
    ),
    row(takes, "vllm.distributed:get_tensor_model_parallel_rank", "trim_kv: a rank's KV heads of the gates"),
)

_CONFIG = (
    row(
        has,
        "vllm.config:VllmConfig",
        "what the plugins' checks, the banner and the metrics read",
        [
            *("model_config", "cache_config", "parallel_config", "scheduler_config", "compilation_config"),
            *("attention_config", "speculative_config", "kv_transfer_config", "additional_config", "instance_id"),
        ],
    ),
    row(
        has,
        "vllm.config:ModelConfig",
        "what the checks know of the model",
        [
            *("model", "dtype", "max_model_len", "is_attention_free", "is_encoder_decoder", "use_mla"),
            *("get_head_size", "get_total_num_kv_heads", "get_num_kv_heads", "get_num_attention_heads"),
            *("get_total_num_hidden_layers", "get_sliding_window"),
        ],
    ),
    row(sets, "vllm.config:ModelConfig", "the same, set when it is made", ["runner_type", "hf_text_config"]),
    row(has, "vllm.config:CacheConfig", "page size and dtype of the KV cache", ["block_size", "cache_dtype"]),
    row(
        has,
        "vllm.config:ParallelConfig",
        "refuses what does not shard by KV heads; names the counter file",
        ["tensor_parallel_size", "decode_context_parallel_size", "rank"],
    ),
    row(has, "vllm.config:SchedulerConfig", "sizes the engine's buffers", ["max_num_seqs"]),
    row(has, "vllm.config:SpeculativeConfig", "query tokens of a decode step", ["num_speculative_tokens"]),
    row(has, "vllm.config:CompilationConfig", "graph mode in the banner", ["cudagraph_mode"]),
    row(takes, "vllm.config:get_current_vllm_config", "the configuration in attention layers"),
    row(
        takes,
        "vllm.config:get_layers_from_vllm_config",
        "finds the layers of a KV-cache group",
        ["vllm_config", "layer_type", "layer_names"],
    ),
)

_ATTENTION = (
    row(
        has,
        f"{_BACKEND}:AttentionBackend",
        "base class of the sparse backend",
        ["get_name", "get_impl_cls", "get_builder_cls", "validate_configuration", "supports_kv_connector"],
    ),
    row(takes, f"{_BACKEND}:AttentionBackend.customize_spec", "adds the page index to the KV spec", ["spec"]),
    row(
        takes,
        f"{_BACKEND}:AttentionMetadataBuilder.build",
        "per-step metadata",
        ["common_prefix_len", "common_attn_metadata", "fast_build"],
    ),
    row(
        has,
        f"{_BACKEND}:CommonAttentionMetadata",
        "lengths, block tables and slots of a step; which rows are still prompts",
        [
            *("query_start_loc", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound", "num_reqs"),
            *("num_actual_tokens", "max_query_len", "block_table_tensor", "slot_mapping", "is_prefilling"),
        ],
    ),
    row(
        has,
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        "the KV spec of full-attention layers",
        [
            *("block_size", "num_kv_heads", "head_size", "dtype"),
            *("page_size_padded", "unpadded_page_size_bytes", "page_size_bytes"),
        ],
    ),
    Hook(
        "vllm.v1.kv_cache_interface:FullAttentionSpec.page_size_padded",
        "room for the page index behind each page",
        padding_counts,
    ),
    row(sets, "vllm.model_executor.layers.attention:Attention", "marks a layer as sparse", ["impl"]),
    row(takes, "vllm.model_executor.models.utils:extract_layer_index", "layer numbers (dense_layers)", ["layer_name"]),
    row(takes, "vllm.v1.metrics.prometheus:get_prometheus_registry", "shows our collector at /metrics"),
    row(
        takes,
        "vllm.v1.metrics.prometheus:setup_multiprocess_prometheus",
        "several API servers: workers count in prometheus_client's files",
    ),
)

_ON_CPU = (
    _cpu(has, f"{_CPU}:CPUAttentionBackend", "stock attention, subclassed", ["get_impl_cls", "get_builder_cls"]),
    _cpu(
        equals,
        f"{_CPU}:CPUAttentionBackend.forward_includes_kv_cache_update",
        "keys are in the cache before forward runs",
        False,
    ),
    _cpu(takes, f"{_CPU}:CPUAttentionBackendImpl.forward", "prefill and dense rows", _FORWARD_ARGS),
    _cpu(takes, f"{_CPU}:CPUAttentionBackendImpl.do_kv_cache_update", "updates the page index", _UPDATE_ARGS),
    _cpu(sets, f"{_CPU}:CPUAttentionBackendImpl", "which layers can be sparse", _IMPL),
    _cpu(takes, f"{_CPU}:CPUAttentionMetadataBuilder", "per-step metadata, extended", _BUILDER_ARGS),
    _cpu(has, f"{_CPU}:CPUAttentionMetadata", "block tables and lengths of a step", ["seq_lens", "block_table"]),
    _cpu(takes, f"{_CPU}:_get_attn_isa", "which order K has inside a page", ["dtype", "block_size", "head_size"]),
    _cpu(
        takes,
        "vllm._custom_ops:cpu_attn_reshape_and_cache",
        "asked once for the order of K",
        ["key", "value", "key_cache", "value_cache", "slot_mapping", "isa", "k_scale", "v_scale", "kv_cache_dtype"],
    ),
)

_ON_CUDA = (
    _cuda(has, f"{_FLASH}:FlashAttentionBackend", "stock attention, subclassed", ["get_impl_cls", "get_builder_cls"]),
    _cuda(
        equals,
        f"{_FLASH}:FlashAttentionBackend.forward_includes_kv_cache_update",
        "keys are in the cache before forward runs",
        False,
    ),
    _cuda(takes, f"{_FLASH}:FlashAttentionImpl.forward", "prefill rows and dense layers", _FORWARD_ARGS),
    _cuda(sets, f"{_FLASH}:FlashAttentionImpl", "which layers can be sparse", _IMPL),
    _cuda(takes, f"{_FLASH}:FlashAttentionMetadataBuilder", "per-step metadata, extended", _BUILDER_ARGS),
    _cuda(
        sets,
        f"{_FLASH}:FlashAttentionMetadataBuilder",
        "heads and head size of the engine",
        ["num_heads_q", "num_heads_kv", "headdim"],
    ),
    _cuda(
        takes,
        f"{_FLASH}:FlashAttentionMetadataBuilder._init_reorder_batch_threshold",
        "decode rows, drafts included, come first in a batch",
        ["reorder_batch_threshold", "supports_spec_as_decode"],
    ),
    _cuda(
        has,
        f"{_FLASH}:FlashAttentionMetadataBuilder",
        "declares FULL graphs for uniform decode batches",
        ["_cudagraph_support", "get_cudagraph_support", "reorder_batch_threshold"],
    ),
    _cuda(has, f"{_BACKEND}:AttentionCGSupport", "the declared value", ["UNIFORM_BATCH"]),
    _cuda(
        has,
        f"{_FLASH}:FlashAttentionMetadata",
        "stock metadata, extended",
        ["num_actual_tokens", "max_query_len", "query_start_loc", "seq_lens", "block_table", "slot_mapping"],
    ),
    _cuda(
        takes,
        "vllm.v1.attention.backends.utils:split_decodes_and_prefills",
        "splits a mixed batch; short rests of prompts stay prefill",
        ["common_attn_metadata", "decode_threshold", "treat_short_extends_as_decodes"],
    ),
)

_METHODS = (*_MOE, *hooks_spec.ROWS, *hooks_tiles.ROWS, *hooks_kv.ROWS)
TABLE: tuple[Hook, ...] = (*_GLUE, *_WORKERS, *_CONFIG, *_ATTENTION, *_ON_CPU, *_ON_CUDA, *_METHODS)
"""All rows; those of another platform are never probed."""


def version_problem() -> str:
    """ "" if the installed vLLM is the one the table describes, else one sentence."""
    import vllm

    version = str(getattr(vllm, "__version__", "unknown"))
    if version.split(".")[:2] == VLLM_VERSION.split("."):
        return ""
    return f"vLLM {version} is not the supported {VLLM_VERSION}.x; install vllm=={VLLM_VERSION}.0 or another vllm-ext."


def platform_name() -> str:
    """ "cpu", "cuda", or the name of a platform that is not supported."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        return "cuda"
    return "cpu" if current_platform.is_cpu() else str(getattr(current_platform, "device_name", "unknown"))


def refusal() -> str:
    """Why `plugin.register` must leave this vLLM alone, as one sentence, or "" if it need not."""
    if problem := version_problem():
        return problem
    platform = platform_name()
    if platform not in ("cpu", "cuda"):
        return f"the platform '{platform}' is not supported; use CUDA or a CPU."
    for hook in TABLE:
        if hook.rebound and platform in hook.platforms and (problem := hook.problem()):
            return problem
    return ""
