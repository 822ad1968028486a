"""KV eviction on CPUs: stock CPU attention over the resident end of every request's block table."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_ext.attention_backends.cpu_backend import cache_views
from vllm_ext.kv_managers.method import BACKEND_NAME
from vllm_ext.kv_managers.support import Steps, activate, evicting_spec, new_ring, record_index, store_side


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


class EvictionCPUImpl(CPUAttentionBackendImpl):
    """Stock forward; the queries that will score are kept."""

    ring: torch.Tensor | None = None
    side: torch.Tensor | None = None
    side_input: torch.Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        activate(get_current_vllm_config())

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        self.ring = new_ring(self, act_dtype)

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
        """Same contract as the stock implementation."""
        if attn_metadata is not None and attn_metadata.record_tokens is not None and self.ring is not None:
            taken = query.view(-1, self.num_heads, self.head_size)[attn_metadata.record_tokens]
            self.ring.flatten(0, 1)[attn_metadata.record_places] = taken
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write the new keys and values, and what the method stores beside them."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.side is not None and self.side_input is not None:
            store_side(self.side, self.side_input, slot_mapping)
