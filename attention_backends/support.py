"""What both platforms' backends share: the active method, the padded KV spec, the index view, eligible layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from vllm_ext.attention_backends.method import SparseMethod
from vllm_ext.options import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_ext.attention_backends.stages import StageDims

MAX_QUERY_TOKENS = 8
"""Most query tokens of one request in a sparse decode step (1 + speculated tokens)."""

_active: SparseMethod | None = None


def active_method(vllm_config: VllmConfig) -> SparseMethod:
    """The sparse method that this configuration selects; remembered for `padded_spec`, which gets no configuration."""
    from vllm_ext.config import from_additional

    global _active
    methods = [p for p in from_additional(vllm_config.additional_config).values() if isinstance(p, SparseMethod)]
    if len(methods) != 1:
        raise ConfigError(
            f"the attention backend needs exactly one sparse attention plugin and got {len(methods)}; "
            "select one with --plugins, e.g. --plugins quest."
        )
    _active = methods[0]
    return _active


def padded_spec(spec: AttentionSpec) -> AttentionSpec:
    """The KV spec with room for the page index behind each page; windowed layers keep theirs."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    if type(spec) is not FullAttentionSpec or spec.page_size_padded is not None or _active is None:
        return spec
    record = spec.num_kv_heads * _active.record_elements(spec.head_size) * spec.dtype.itemsize
    return replace(spec, page_size_padded=spec.unpadded_page_size_bytes + record) if record else spec


def index_view(kv_cache: torch.Tensor, method: SparseMethod, head_size: int) -> torch.Tensor | None:
    """The index records in the padding of the pages.

    Args:
        kv_cache: [num_pages, H, P, 2 * D] view of one layer's cache, any strides.

    Returns:
        [num_pages, H, K, D] view of the same storage in the cache's dtype, or None if the method keeps no index.
    """
    size = method.record_elements(head_size)
    if not size:
        return None
    pages, heads, page, width = kv_cache.shape
    content, stride = heads * page * width, kv_cache.stride(0)
    if stride - content < heads * size:
        raise RuntimeError(
            f"the KV cache leaves {stride - content} elements behind a page where the page index needs {heads * size}; "
            "this KV-cache layout is not supported."
        )
    return kv_cache.as_strided(
        (pages, heads, size // head_size, head_size),
        (stride, size, head_size, 1),
        kv_cache.storage_offset() + content,
    )


def stock_reason(impl: Any) -> str | None:
    """Why a layer is left to the stock kernel, or None if it can be sparse."""
    window = impl.sliding_window
    if (window[0] if isinstance(window, tuple) else window) not in (None, -1):
        return "sliding window"
    if impl.alibi_slopes is not None:
        return "ALiBi"
    if impl.logits_soft_cap:
        return "logits soft cap"
    if impl.sinks is not None:
        return "attention sinks"
    if impl.attn_type != "decoder":
        return f"{impl.attn_type} attention"
    if impl.kv_sharing_target_layer_name is not None:
        return "shared KV cache"
    return None


def stage_dims(
    cfg: VllmConfig, layer_names: list[str], spec: AttentionSpec, num_heads: int, query_len: int | None, device: Any
) -> StageDims:
    """Sizes of the stages of the sparse layers `layer_names`; query_len: most query tokens of a decode row."""
    from vllm.model_executor.models.utils import extract_layer_index

    from vllm_ext.attention_backends.stages import StageDims

    return StageDims(
        num_heads=num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        max_requests=cfg.scheduler_config.max_num_seqs,
        max_model_len=cfg.model_config.max_model_len,
        max_query_len=query_len or 1,
        device=device,
        dtype=spec.dtype,
        layers=tuple(sorted(extract_layer_index(name) for name in layer_names)),
        tp_rank=cfg.parallel_config.rank % cfg.parallel_config.tensor_parallel_size,
        tp_size=cfg.parallel_config.tensor_parallel_size,
        vllm_config=cfg,
    )


def mark_layers(vllm_config: VllmConfig, layer_names: list[str], method: SparseMethod) -> list[str]:
    """Set `impl.method` on the layers of a group that run sparse; returns their names in model order."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.logger import init_logger
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    sparse, reasons = [], []
    for name, layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).items():
        reason = stock_reason(layer.impl)
        dense = extract_layer_index(name) in method.dense_layers or reason is not None
        layer.impl.method = None if dense else method
        layer.impl.layer_number = extract_layer_index(name)
        if not dense:
            sparse.append(name)
        if reason:
            reasons.append(reason)
    if reasons:
        text = ", ".join(sorted(set(reasons)))
        init_logger("vllm.vllm_ext").info("%d layers are left to stock attention (%s).", len(reasons), text)
    return sparse
