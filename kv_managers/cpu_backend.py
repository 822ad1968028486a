"""KV eviction on CPUs: stock CPU attention over the resident end of every request's block table."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_ext.attention_backends.cpu_backend import cache_views
from vllm_ext.kv_managers.method import BACKEND_NAME
from vllm_ext.kv_managers.recording import RecordingImpl
from vllm_ext.kv_managers.support import Steps, activate, evicting_spec, record_index


@dataclass
class EvictionCPUMetadata(CPUAttentionMetadata):
    """Stock metadata plus the queries to record: tokens of the batch [k] and rows of the flattened ring [k]."""

    record_tokens: torch.Tensor | None = None
    record_places: torch.Tensor | None = None


class EvictionCPUBackend(CPUAttentionBackend):
    """CPU attention over what eviction left."""

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[EvictionCPUImpl]:
        return EvictionCPUImpl

    @staticmethod
    def get_builder_cls() -> type[EvictionCPUBuilder]:
        return EvictionCPUBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return evicting_spec(super().customize_spec(spec))


class EvictionCPUBuilder(CPUAttentionMetadataBuilder):
    """Evicts what is due, then hands the stock builder shifted block tables."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        activate(vllm_config)
        self.steps = Steps(vllm_config, layer_names, kv_cache_spec.counts, cache_views)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> EvictionCPUMetadata:
        starts, records = self.steps.begin(common_attn_metadata)
        common = shifted(common_attn_metadata, starts, self.steps.counts.method.block_size)
        meta = EvictionCPUMetadata(**vars(super().build(common_prefix_len, common, fast_build)))
        if records:
            tokens, places = record_index(records, self.steps.counts.method.window)
            meta.record_tokens, meta.record_places = torch.tensor(tokens), torch.tensor(places)
        return meta


def shifted(common: CommonAttentionMetadata, starts: list[int], block: int) -> CommonAttentionMetadata:
    """The batch with block tables and lengths from each row's first resident slot on."""
    if not any(starts):
        return common
    first = torch.tensor(starts, dtype=common.seq_lens.dtype)
    table, part = common.block_table_tensor, copy.copy(common)
    columns = torch.arange(table.shape[1])[None] + (first // block)[:, None]
    part.block_table_tensor = table.gather(1, columns.clamp_(max=table.shape[1] - 1).long())
    part.seq_lens = common.seq_lens - first
    part.max_seq_len = int(part.seq_lens.max())
    return part


class EvictionCPUImpl(RecordingImpl, CPUAttentionBackendImpl):
    """Stock forward; the queries that will score are kept."""

    def record(self, query: torch.Tensor, meta: EvictionCPUMetadata, ring: torch.Tensor) -> None:
        if meta.record_tokens is not None:
            taken = query.view(-1, self.num_heads, self.head_size)[meta.record_tokens]
            ring.flatten(0, 1)[meta.record_places] = taken
