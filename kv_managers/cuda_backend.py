"""KV eviction on CUDA: FlashAttention over the resident end of every request's block table, FULL graphs in decode.

What a graph reads lies in buffers of this builder: shifted block tables and lengths, and for every token of the step
the place of its query among those that will score. Evictions run while metadata is built, between two graphs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from vllm_ext.kernels.kv_tables import record_queries, shift_tables
from vllm_ext.kv_managers.device_ops import DeviceOps
from vllm_ext.kv_managers.method import BACKEND_NAME
from vllm_ext.kv_managers.recording import RecordingImpl
from vllm_ext.kv_managers.support import Steps, activate, evicting_spec, record_index


@dataclass
class EvictionMetadata(FlashAttentionMetadata):
    """Stock metadata; `places` [T] int32: where each token's query is recorded (-1: nowhere); None = nothing to do."""

    places: torch.Tensor | None = None


class EvictionFlashBackend(FlashAttentionBackend):
    """FlashAttention over what eviction left."""

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[EvictionFlashImpl]:
        return EvictionFlashImpl

    @staticmethod
    def get_builder_cls() -> type[EvictionFlashBuilder]:
        return EvictionFlashBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return evicting_spec(super().customize_spec(spec))

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


class EvictionFlashBuilder(FlashAttentionMetadataBuilder):
    """Evicts what is due, then hands the stock builder shifted block tables in buffers of its own."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = False  # a table of another group would not be shifted

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """FULL graphs for decode batches."""
        return cls._cudagraph_support

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        activate(vllm_config)
        self.block = kv_cache_spec.counts.method.block_size
        self.steps = Steps(vllm_config, layer_names, kv_cache_spec.counts, _halves, DeviceOps())
        rows = vllm_config.scheduler_config.max_num_seqs
        self.starts = torch.zeros(rows, dtype=torch.int32, device=device)
        self.known_starts = [0] * rows
        self.lens = torch.zeros(rows, dtype=torch.int32, device=device)
        self.table: torch.Tensor | None = None
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.places = torch.full((tokens,), -1, dtype=torch.int32, device=device)
        self.placed = 0

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> EvictionMetadata:
        starts, records = self.steps.begin(common_attn_metadata)
        common = self._shifted(common_attn_metadata, starts)
        meta = EvictionMetadata(**vars(super().build(common_prefix_len, common, fast_build)))
        if self._place(records):
            meta.places = self.places[: common.num_actual_tokens]
        return meta

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> EvictionMetadata:
        """The captured step records whatever `places` will say."""
        meta = super().build_for_cudagraph_capture(common_attn_metadata)
        if self.steps.counts.method.needs_queries:
            meta.places = self.places[: common_attn_metadata.num_actual_tokens]
        return meta

    def _shifted(self, c: CommonAttentionMetadata, starts: list[int]) -> CommonAttentionMetadata:
        rows = c.num_reqs
        if starts != self.known_starts[:rows]:
            self.starts[:rows].copy_(_pinned(starts), non_blocking=True)
            self.known_starts[:rows] = starts
        if self.table is None:
            self.table = c.block_table_tensor.new_zeros(self.lens.shape[0], c.block_table_tensor.shape[1])
        part = copy.copy(c)
        part.block_table_tensor, part.seq_lens = self.table[:rows], self.lens[:rows]
        table = c.block_table_tensor[:rows, : self.table.shape[1]]
        shift_tables(table, self.starts[:rows], c.seq_lens[:rows], part.block_table_tensor, part.seq_lens, self.block)
        if c.seq_lens_cpu_upper_bound is not None:
            bound = c.seq_lens_cpu_upper_bound[:rows] - torch.tensor(starts, dtype=torch.int32)
            part.seq_lens_cpu_upper_bound = bound.clamp_(min=0)
            if any(starts):
                part.max_seq_len = max(1, int(part.seq_lens_cpu_upper_bound.max()))
        return part

    def _place(self, records: list[tuple[int, int, int, int]]) -> bool:
        """Write where queries go; whether any goes anywhere."""
        if not records and not self.placed:
            return False
        tokens, places = record_index(records, self.steps.counts.method.window)
        length = max([self.placed, *(t + 1 for t in tokens)])
        host = torch.full((length,), -1, dtype=torch.int32, pin_memory=True)
        host[tokens] = torch.tensor(places, dtype=torch.int32)
        self.places[:length].copy_(host, non_blocking=True)
        self.placed = length if records else 0
        return bool(records)


def _halves(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a cache [num_blocks, H, P, 2 * D]."""
    size = cache.shape[3] // 2
    return cache[..., :size], cache[..., size:]


def _pinned(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, pin_memory=True)


class EvictionFlashImpl(RecordingImpl, FlashAttentionImpl):
    """Stock forward; the queries that will score are kept."""

    def record(self, query: torch.Tensor, meta: EvictionMetadata, ring: torch.Tensor) -> None:
        if meta.places is not None:
            record_queries(query, meta.places, ring)
