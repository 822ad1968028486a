"""What the eviction engine refuses before weights are loaded, and what it says of itself at start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_ext.decoder import check_decoder
from vllm_ext.kv_managers import memory
from vllm_ext.kv_managers.counts import Counts
from vllm_ext.kv_managers.method import KVMethod
from vllm_ext.options import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

COMPATIBILITY = {
    "block sizes": "16, 32, 64, 128; on CPUs a multiple of 32",
    "dtypes": "bfloat16 and float16; float32 on CPUs",
    "chunked prefill, mixed batches": "works",
    "prefix caching": "works; a compressed request shares what lies before its survivors and publishes nothing later",
    "preemption and recompute": "works; a recomputed request is compressed again, from its whole prompt",
    "n > 1, abort": "works",
    "async scheduling, model runners V1 and V2": "works",
    "CUDA graphs (FULL decode and PIECEWISE), torch.compile": "works; evictions run between graphs",
    "tensor parallelism": "scope head works up to one KV head a rank; scopes layer and model are refused",
    "speculative decoding": "refused",
    "pipeline and context parallelism": "refused",
    "fp8 KV cache": "refused",
    "KV connectors (offload, P/D)": "refused: blocks of a compressed request hold other tokens than their hashes say",
    "sliding-window and hybrid models, MLA, ALiBi, attention sinks": "refused",
}
"""The compatibility table of the README; `check` below is its code."""


def _fail(text: str) -> None:
    raise ConfigError(text)


def check(method: KVMethod, vllm_config: VllmConfig) -> None:
    """Raise ConfigError, one sentence with option and remedy, for whatever `method` cannot serve."""
    _check_model(method, vllm_config)
    _check_engine(method, vllm_config)
    _check_parallel(method, vllm_config)
    _check_memory(method, vllm_config)


def _check_model(method: KVMethod, cfg: VllmConfig) -> None:
    name, model = method.plugin_name(), cfg.model_config
    hf = model.hf_text_config
    check_decoder(name, model)
    kinds = getattr(hf, "layer_types", None) or []
    if any(k != "full_attention" for k in kinds) or (not kinds and model.get_sliding_window() is not None):
        _fail(
            f"--plugins {name} does not support models with sliding-window or other non-full-attention layers such as "
            f"{model.model}; drop the plugin."
        )
    if method.needs_output_weight and model.quantization is not None:
        _fail(f"--plugins {name} reads the output projection and needs unquantized weights, not {model.quantization}.")


def _check_engine(method: KVMethod, cfg: VllmConfig) -> None:
    from vllm.platforms import current_platform

    name, cache, block = method.plugin_name(), cfg.cache_config, method.block_size
    if cache.block_size != block:
        _fail(f"{name}.block_size is {block} but --block-size is {cache.block_size}; give both the same value.")
    if current_platform.is_cpu() and block % 32:
        _fail(f"{name}.block_size must be a multiple of 32 on CPUs, not {block}; use 32, 64 or 128.")
    if not current_platform.is_cpu() and str(cfg.model_config.dtype) == "torch.float32":
        _fail(f"--plugins {name} needs --dtype bfloat16 or float16 on a GPU, not {cfg.model_config.dtype}.")
    if cache.cache_dtype not in ("auto", "float16", "bfloat16"):
        _fail(f"--plugins {name} does not support --kv-cache-dtype {cache.cache_dtype}; use auto.")
    if cfg.speculative_config is not None:
        _fail(f"--plugins {name} cannot be used with --speculative-config: drafts would be evicted; drop one of them.")
    if cfg.kv_transfer_config is not None:
        _fail(
            f"--plugins {name} cannot be used with --kv-transfer-config: connectors find blocks by position; "
            "drop one of them."
        )


def _check_parallel(method: KVMethod, cfg: VllmConfig) -> None:
    name, par = method.plugin_name(), cfg.parallel_config
    if par.pipeline_parallel_size > 1:
        _fail(f"--plugins {name} does not support pipeline parallelism; set --pipeline-parallel-size 1.")
    if par.decode_context_parallel_size > 1 or getattr(par, "prefill_context_parallel_size", 1) > 1:
        _fail(f"--plugins {name} does not support context parallelism; set --decode-context-parallel-size 1.")
    if getattr(par, "enable_dbo", False):
        _fail(f"--plugins {name} does not support --enable-dbo; drop it.")
    kv_heads = cfg.model_config.get_total_num_kv_heads()
    if par.tensor_parallel_size > kv_heads:
        _fail(
            f"--plugins {name} needs --tensor-parallel-size of at most {kv_heads}, the model's number of KV heads, "
            f"not {par.tensor_parallel_size}."
        )
    if par.tensor_parallel_size > 1 and method.scope != "head":
        _fail(f"{name}.scope {method.scope} mixes heads of several ranks; use scope head or --tensor-parallel-size 1.")
    if par.tensor_parallel_size > 1 and method.needs_output_weight:
        _fail(f"--plugins {name} reads the whole output projection; set --tensor-parallel-size 1.")


def _check_memory(method: KVMethod, cfg: VllmConfig) -> None:
    shares = method.layer_shares(cfg.model_config.get_total_num_hidden_layers())
    sizes = {s: shares.count(s) for s in shares}
    if len(set(sizes.values())) > 1:
        _fail(f"--plugins {method.plugin_name()}: its budgets divide the layers unevenly ({sizes}); drop the plugin.")


def window_bytes(method: KVMethod, cfg: VllmConfig) -> int:
    """Bytes of a rank's query windows."""
    from vllm_ext.kv_managers.support import ring_slots

    model = cfg.model_config
    row = model.get_num_attention_heads(cfg.parallel_config) * model.get_head_size() * model.dtype.itemsize
    return ring_slots(method, cfg) * method.window * row * model.get_num_layers(cfg.parallel_config)


def banner(method: KVMethod, cfg: VllmConfig) -> dict[str, str]:
    """Rows of the start-up banner."""
    longest = cfg.model_config.max_model_len
    shares = method.layer_shares(cfg.model_config.get_total_num_hidden_layers())
    counts = [Counts(method, s) for s in dict.fromkeys(shares)]
    kept = " / ".join(str(c.kept(longest)) for c in counts)
    what = f"{method.ratio:.0%} of the prompt" if method.budget is None else f"{kept} tokens"
    when = {
        "prefill_end": "once, after the prompt",
        "decode": f"after the prompt, then every {method.stride} tokens",
        "streaming": f"every {method.stride} tokens, in the prompt too",
    }[method.trigger]
    in_flight = cfg.max_in_flight_tokens + cfg.scheduler_config.max_num_batched_tokens
    peak = max(c.most_resident(longest, in_flight) for c in counts)
    rows = {
        "keeps": f"{what} per KV head and layer (scope {method.scope})",
        "evicts": when,
        "memory": f"at most {peak} tokens ({peak * memory.token_bytes(cfg) / 2**20:.0f} MiB) a request at once, "
        f"{kept} after an eviction of {longest}",
    }
    if not any((c.first_event(longest) or longest + 1) <= longest for c in counts):
        rows["evicts"] = f"nothing: no request of --max-model-len {longest} outgrows the budget"
        rows["memory"] = f"at most {peak} tokens ({peak * memory.token_bytes(cfg) / 2**20:.0f} MiB) a request at once"
    if beside := memory.text(method, cfg):
        rows["beside it"] = f"{beside}; taken off the KV memory"
    if method.needs_queries:
        rows["query window"] = f"{window_bytes(method, cfg) / 2**20:.0f} MiB (falls with --max-num-seqs)"
    if cfg.cache_config.enable_prefix_caching:
        hit = Counts(method).longest_hit(longest)
        rows["prefix caching"] = "on" if hit is None else f"on; up to {hit} tokens of a prompt of {longest} are shared"
    return rows
