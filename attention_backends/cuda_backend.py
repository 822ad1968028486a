"""The sparse backend on CUDA: FlashAttention for prefill and dense layers, the method's stages for decode rows."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_ext.attention_backends.method import BACKEND_NAME, SparseMethod
from vllm_ext.attention_backends.stages import DecodeBatch, Stages
from vllm_ext.attention_backends.support import active_method, index_view, mark_layers, padded_spec, stage_dims
from vllm_ext.metrics import Counters, Exporter


@dataclass
class SparseMetadata(FlashAttentionMetadata):
    """Stock metadata of the whole batch (for dense layers), plus the decode rows and the prefill rows apart."""

    decode: DecodeBatch | None = None
    prefill: FlashAttentionMetadata | None = None
    stages: Stages | None = None


class SparseFlashBackend(FlashAttentionBackend):
    """FlashAttention whose decode steps read a list of pages."""

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[SparseFlashImpl]:
        return SparseFlashImpl

    @staticmethod
    def get_builder_cls() -> type[SparseFlashBuilder]:
        return SparseFlashBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return padded_spec(super().customize_spec(spec))

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


class SparseFlashBuilder(FlashAttentionMetadataBuilder):
    """Splits a batch into decode rows (the method's stages) and prefill rows (FlashAttention)."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = False  # the decode and prefill parts hold slices of the block table

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.method = active_method(vllm_config)
        sparse = mark_layers(vllm_config, layer_names, self.method)
        self.stages: Stages | None = None
        self._any_dense = False
        if sparse:
            threshold = self.reorder_batch_threshold
            dims = stage_dims(vllm_config, sparse, kv_cache_spec, self.num_heads_q, threshold, device)
            self.stages = self.method.stages(dims)
            self.stages.allocate()
            self.always_dense = torch.zeros(dims.max_requests, dtype=torch.int32, device=device)
            counters = Counters(len(sparse) * self.num_heads_kv, self.stages.page_bytes)
            self.counters = DeviceCounters(self.stages.stats, counters, Exporter(vllm_config, layer_names[0]))

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        """Stock metadata; with sparse layers in the group, a SparseMetadata."""
        meta = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self.stages is None:
            return meta
        self.counters.publish()
        c, threshold = common_attn_metadata, self.reorder_batch_threshold or 1
        meta = SparseMetadata(**vars(meta), stages=self.stages)
        if c.max_query_len <= threshold:
            requests, tokens = c.num_reqs, c.num_actual_tokens
        else:
            requests, prefills, tokens, _ = split_decodes_and_prefills(
                c, threshold, treat_short_extends_as_decodes=False
            )
            meta.prefill = super().build(0, prefill_part(c, requests, tokens), True) if prefills and requests else None
        if requests:
            meta.decode = self._decode_batch(c, requests, tokens, min(c.max_query_len, threshold))
        return meta

    def _decode_batch(self, c: CommonAttentionMetadata, requests: int, tokens: int, m: int) -> DecodeBatch:
        dense = self.always_dense
        flags = c.is_prefilling
        any_dense = flags is not None and bool(flags[:requests].any())
        if flags is not None and (self._any_dense or any_dense):  # rare: spare the copy
            count = min(requests, flags.shape[0])
            dense[:count].copy_(flags[:count].to(torch.int32), non_blocking=True)
            dense[count:].zero_()
            self._any_dense = any_dense
        return DecodeBatch(
            c.block_table_tensor[:requests],
            c.seq_lens[:requests],
            c.query_start_loc[: requests + 1],
            c.slot_mapping[:tokens],
            dense[:requests],
            tokens,
            m,
        )


def prefill_part(c: CommonAttentionMetadata, requests: int, tokens: int) -> CommonAttentionMetadata:
    """The rows behind the first `requests` requests (`tokens` tokens) as a batch of their own."""
    part = copy.copy(c)
    part.query_start_loc = c.query_start_loc[requests:] - tokens
    part.query_start_loc_cpu = c.query_start_loc_cpu[requests:] - tokens
    part.seq_lens = c.seq_lens[requests:]
    if c.seq_lens_cpu_upper_bound is not None:
        part.seq_lens_cpu_upper_bound = c.seq_lens_cpu_upper_bound[requests:]
    part.num_reqs = c.num_reqs - requests
    part.num_actual_tokens = c.num_actual_tokens - tokens
    part.block_table_tensor = c.block_table_tensor[requests:]
    part.slot_mapping = c.slot_mapping[tokens:]
    return part


def prompt_rows(meta: FlashAttentionMetadata) -> DecodeBatch:
    """The rows of prompts as the stages take them."""
    return DecodeBatch(
        meta.block_table,
        meta.seq_lens,
        meta.query_start_loc,
        meta.slot_mapping[: meta.num_actual_tokens],
        torch.ones_like(meta.seq_lens),
        meta.num_actual_tokens,
        meta.max_query_len,
    )


class SparseFlashImpl(FlashAttentionImpl):
    """Stock forward for dense layers and prefill rows; the method's stages for decode rows."""

    method: SparseMethod | None = None
    layer_number = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        active_method(get_current_vllm_config())

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Same contract as FlashAttention's: query [tokens, Hq, D], kv_cache [pages, H, P, 2D], output in place."""
        meta = attn_metadata
        if meta is None or self.method is None:
            return super().forward(layer, query, key, value, kv_cache, meta, output, output_scale, output_block_scale)
        keys, values = kv_cache[..., : self.head_size], kv_cache[..., self.head_size :]
        index = index_view(kv_cache, self.method, self.head_size)
        decode: DecodeBatch | None = meta.decode
        stages, number = meta.stages, self.layer_number
        done = 0
        if decode is not None:
            done = decode.tokens
            if not stages.warm and number == stages.dims.layers[0] and not torch.cuda.is_current_stream_capturing():
                stages.warm_up(query, keys, values, index, decode.block_table, self.scale)
            stages.decode(number, query[:done], keys, values, index, decode, output[:done], self.scale)
        if done == meta.num_actual_tokens:
            return output
        rest = meta.prefill if decode is not None else meta
        part = [x[done : meta.num_actual_tokens] for x in (query, key, value)]
        stages.write_index(number, part[0], keys, values, index, prompt_rows(rest), self.scale)
        super().forward(layer, *part, kv_cache, rest, output[done : meta.num_actual_tokens])
        return output


class DeviceCounters:
    """Brings the stages' counters to the host without a sync: each step starts a copy and publishes a finished one."""

    def __init__(self, stats: torch.Tensor, counters: Counters, exporter: Exporter) -> None:
        self.stats, self.counters, self.exporter = stats, counters, exporter
        self.host = torch.zeros(stats.shape, dtype=stats.dtype, pin_memory=stats.is_cuda)
        self.event = torch.cuda.Event()
        self.started = False

    def publish(self) -> None:
        """Publish the totals of a step before this one."""
        if torch.cuda.is_current_stream_capturing():
            return
        if self.started:
            if not self.event.query():
                return
            self.counters.values = self.host.tolist()
            self.exporter.write(self.counters)
        self.started = True
        self.host.copy_(self.stats, non_blocking=True)
        self.event.record()
