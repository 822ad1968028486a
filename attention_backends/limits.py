"""What the sparse attention engine refuses before weights are loaded, and what it says of itself at start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_ext.attention_backends.method import PAGE_SIZES, SparseMethod
from vllm_ext.decoder import check_decoder
from vllm_ext.options import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

HEAD_SIZES = (64, 80, 96, 128, 256)
MAX_GROUP = 16
MAX_PAGES = 16384

COMPATIBILITY = {
    "page sizes (= vLLM's block size)": f"{', '.join(map(str, PAGE_SIZES))}; on CPUs a multiple of 32",
    "head sizes": f"{', '.join(map(str, HEAD_SIZES))} on GPUs; on CPUs what vLLM's CPU attention takes",
    "query heads a KV head": f"up to {MAX_GROUP}",
    "dtypes": "bfloat16 and float16; float32 on CPUs only",
    "context": f"up to {MAX_PAGES} pages, with pages of 64 that is {MAX_PAGES * 64:,} tokens",
    "chunked prefill, mixed batches": "works",
    "prefix caching": "works; the page index is part of the cached page",
    "preemption and recompute": "works; recomputed tokens are dense, but for a rest of at most 8",
    "n > 1, abort": "works",
    "CUDA graphs (FULL and PIECEWISE), torch.compile": "works",
    "async scheduling, model runners V1 and V2": "works",
    "speculative decoding": "up to 7 draft tokens; one page list per request and KV head",
    "tensor parallelism": "works up to one KV head a rank; more ranks are refused",
    "context parallelism (DCP, PCP)": "refused",
    "fp8 KV cache": "refused",
    "KV connectors (offload, P/D)": "refused: they do not move the page index",
    "sliding-window layers": "stock; a model without any full-attention layer is refused",
    "attention sinks, ALiBi, logits soft cap": "refused",
    "MLA, encoder, pooling and attention-free models": "refused",
}
"""The compatibility table of the README; `check` below and `support.stock_reason` are its code."""


def _fail(text: str) -> None:
    raise ConfigError(text)


def check(method: SparseMethod, vllm_config: VllmConfig) -> None:
    """Raise ConfigError, one sentence with option and remedy, for whatever `method` cannot serve."""
    _check_model(method, vllm_config)
    _check_layers(method, vllm_config)
    _check_engine(method, vllm_config)


def _check_model(method: SparseMethod, cfg: VllmConfig) -> None:
    name, model = method.plugin_name(), cfg.model_config
    check_decoder(name, model)
    head = model.get_head_size()
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() and head not in HEAD_SIZES:
        _fail(f"--plugins {name} needs a head size of {', '.join(map(str, HEAD_SIZES))}, {model.model} has {head}.")
    if str(model.dtype) == "torch.float32" and not current_platform.is_cpu():
        _fail(f"--plugins {name} needs --dtype bfloat16 or float16 on a GPU, not {model.dtype}.")


def windowed_layers(cfg: VllmConfig) -> list[bool]:
    """Per layer: does it attend to a sliding window only?"""
    hf = cfg.model_config.hf_text_config
    count = cfg.model_config.get_total_num_hidden_layers()
    kinds = getattr(hf, "layer_types", None)
    if kinds:
        return [k != "full_attention" for k in kinds]
    return [cfg.model_config.get_sliding_window() is not None] * count


def sparse_layer_count(method: SparseMethod, cfg: VllmConfig) -> int:
    """Layers of the model that will run sparse."""
    return sum(not w and i not in method.dense_layers for i, w in enumerate(windowed_layers(cfg)))


def _check_layers(method: SparseMethod, cfg: VllmConfig) -> None:
    name, windowed = method.plugin_name(), windowed_layers(cfg)
    wrong = [i for i in method.dense_layers if not 0 <= i < len(windowed)]
    if wrong:
        _fail(f"{name}.dense_layers names layer {wrong[0]}, but the model has layers 0 to {len(windowed) - 1}.")
    if all(windowed):
        _fail(f"--plugins {name}: every layer of {cfg.model_config.model} has a sliding window; drop the plugin.")
    if not sparse_layer_count(method, cfg):
        _fail(f"{name}.dense_layers keeps every layer dense; leave at least one full-attention layer out of it.")


def _check_engine(method: SparseMethod, cfg: VllmConfig) -> None:
    from vllm.platforms import current_platform

    name, cache, par = method.plugin_name(), cfg.cache_config, cfg.parallel_config
    if cache.block_size != method.page_size:
        _fail(
            f"{name}.page_size is {method.page_size} but --block-size is {cache.block_size}; give both the same value."
        )
    if current_platform.is_cpu() and method.page_size % 32:
        _fail(f"{name}.page_size must be a multiple of 32 on CPUs, not {method.page_size}; use 32, 64 or 128.")
    if cache.cache_dtype not in ("auto", "float16", "bfloat16"):
        _fail(f"--plugins {name} does not support --kv-cache-dtype {cache.cache_dtype}; use auto.")
    kv_heads = cfg.model_config.get_total_num_kv_heads()
    if par.tensor_parallel_size > kv_heads:
        _fail(
            f"--plugins {name} needs --tensor-parallel-size of at most {kv_heads}, the model's number of KV heads, "
            f"not {par.tensor_parallel_size}."
        )
    if par.decode_context_parallel_size > 1 or getattr(par, "prefill_context_parallel_size", 1) > 1:
        _fail(f"--plugins {name} does not support context parallelism; set --decode-context-parallel-size 1.")
    group = cfg.model_config.get_num_attention_heads(par) // cfg.model_config.get_num_kv_heads(par)
    if group > MAX_GROUP:
        _fail(f"--plugins {name} supports up to {MAX_GROUP} query heads a KV head, the model has {group}.")
    spec = cfg.speculative_config
    drafts = spec.num_speculative_tokens if spec is not None else 0
    if drafts and drafts > 7:
        _fail(
            f"--plugins {name} supports up to 7 draft tokens a step, --speculative-config asks for {drafts}; "
            "lower num_speculative_tokens."
        )
    rows = (1 + (drafts or 0)) * group
    if not current_platform.is_cpu() and cfg.model_config.get_head_size() > 128 and method.page_size > 64 and rows > 32:
        _fail(
            f"{name}.page_size {method.page_size} does not fit a GPU with heads of {cfg.model_config.get_head_size()} "
            f"and {rows} query rows a KV head; use 64."
        )
    if cfg.kv_transfer_config is not None:
        _fail(f"--plugins {name} cannot be used with --kv-transfer-config: connectors do not move the page index.")
    if -(-cfg.model_config.max_model_len // method.page_size) > MAX_PAGES:
        _fail(
            f"--max-model-len {cfg.model_config.max_model_len} is more than {MAX_PAGES} pages of {method.page_size} "
            f"tokens; lower it or raise {name}.page_size."
        )


def banner(method: SparseMethod, cfg: VllmConfig) -> dict[str, str]:
    """Rows of the start-up banner."""
    layers = windowed_layers(cfg)
    record = method.record_elements(cfg.model_config.get_head_size())
    share = record / (2 * cfg.model_config.get_head_size() * method.page_size)
    rows = {
        "reads": f"{method.budget} of the visible keys ({method.capacity} pages of {method.page_size}) in decode steps",
        "layers": f"{sparse_layer_count(method, cfg)} of {len(layers)} sparse, the others dense",
        "exact": f"prefill, and requests of up to {method.dense_limit} tokens",
        "page index": f"{share:.1%} of the KV cache" if share else "none",
    }
    if any(layers):
        rows["left to stock"] = f"{sum(layers)} layers with a sliding window"
    return rows
