"""The sparse backend on CPUs: stock CPU attention for prefill and dense layers, the references for sparse decode."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_ext.attention_backends.method import BACKEND_NAME, SparseMethod
from vllm_ext.attention_backends.stages import DecodeBatch, Stages
from vllm_ext.attention_backends.support import (
    MAX_QUERY_TOKENS,
    active_method,
    index_view,
    mark_layers,
    padded_spec,
    stage_dims,
)
from vllm_ext.metrics import Counters, Exporter


@dataclass
class SparseCPUMetadata(CPUAttentionMetadata):
    """Stock metadata plus the rows that decode sparsely in this step."""

    sparse_rows: list[int] = field(default_factory=list)
    dense_rows: list[int] = field(default_factory=list)
    lens: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counters: Counters | None = None
    stages: Stages | None = None


class SparseCPUBackend(CPUAttentionBackend):
    """CPU attention whose decode steps read a list of pages."""

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[SparseCPUImpl]:
        return SparseCPUImpl

    @staticmethod
    def get_builder_cls() -> type[SparseCPUBuilder]:
        return SparseCPUBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return padded_spec(super().customize_spec(spec))


class SparseCPUBuilder(CPUAttentionMetadataBuilder):
    """Sorts the rows of a batch into sparse decode, dense decode and prefill."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.method = active_method(vllm_config)
        self.sparse_layers = mark_layers(vllm_config, layer_names, self.method)
        self.stages: Stages | None = None
        self.counters = Counters()
        if self.sparse_layers:
            self.stages = self.method.stages(
                stage_dims(vllm_config, self.sparse_layers, kv_cache_spec, self.num_heads, MAX_QUERY_TOKENS, device)
            )
            self.counters = Counters(len(self.sparse_layers) * kv_cache_spec.num_kv_heads, self.stages.page_bytes)
        self.exporter = Exporter(vllm_config, layer_names[0])

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SparseCPUMetadata:
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        self.exporter.write(self.counters)  # of the steps before this one
        meta = SparseCPUMetadata(**vars(stock), counters=self.counters, stages=self.stages)
        meta.lens = common_attn_metadata.seq_lens.tolist()
        meta.starts = common_attn_metadata.query_start_loc.tolist()
        prefilling = common_attn_metadata.is_prefilling
        flags = prefilling.tolist() if prefilling is not None else []
        for r in range(common_attn_metadata.num_reqs):
            m = meta.starts[r + 1] - meta.starts[r]
            if m == 0 or m > MAX_QUERY_TOKENS or (r < len(flags) and flags[r]):
                continue
            (meta.sparse_rows if meta.lens[r] > self.method.dense_limit else meta.dense_rows).append(r)
        return meta


class SparseCPUImpl(CPUAttentionBackendImpl):
    """Stock forward, then the sparse rows are computed (again) over their pages."""

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
        """Same contract as the stock implementation; rows in `attn_metadata.sparse_rows` read listed pages only."""
        method, meta = self.method, attn_metadata
        if meta is None or method is None:
            return super().forward(layer, query, key, value, kv_cache, meta, output, output_scale, output_block_scale)
        if len(meta.sparse_rows) < meta.seq_lens.shape[0]:
            super().forward(layer, query, key, value, kv_cache, meta, output, output_scale, output_block_scale)
            self._dense(method, query, kv_cache, meta)
        if meta.sparse_rows:
            self._sparse(method, query, kv_cache, meta, output)
        meta.counters.values = meta.stages.stats.tolist()
        return output

    def _sparse(
        self, method: SparseMethod, query: torch.Tensor, kv_cache: torch.Tensor, meta: Any, output: torch.Tensor
    ) -> None:
        out = output.view(-1, self.num_heads, self.head_size)
        batch = rows_of(meta, meta.sparse_rows, False)
        meta.stages.reference_decode(*self._arguments(method, query, kv_cache), batch, out, self.scale)

    def _dense(self, method: SparseMethod, query: torch.Tensor, kv_cache: torch.Tensor, meta: Any) -> None:
        """What the other rows owe to later sparse steps: the index."""
        decode = {*meta.sparse_rows, *meta.dense_rows}
        prompts = [r for r in range(len(meta.lens)) if r not in decode]
        for rows, prompt in ((prompts, True), (meta.dense_rows, False)):
            if rows:
                batch = rows_of(meta, rows, prompt)
                meta.stages.reference_index(*self._arguments(method, query, kv_cache), batch, self.scale)
        for r in meta.dense_rows:
            meta.stages.count(meta.lens[r], kv_cache.shape[1], None)

    def _arguments(self, method: SparseMethod, query: torch.Tensor, kv_cache: torch.Tensor) -> tuple[Any, ...]:
        """The stages' arguments before the batch."""
        keys, values = cache_views(kv_cache)
        index = index_view(kv_cache, method, self.head_size)
        return self.layer_number, query.view(-1, self.num_heads, self.head_size), keys, values, index


def rows_of(meta: SparseCPUMetadata, rows: list[int], prompt: bool) -> DecodeBatch:
    """Some rows of a batch: requests left out have no keys, their tokens no slot."""
    lens, slots = torch.zeros(len(meta.lens), dtype=torch.int32), torch.full_like(meta.slot_mapping, -1)
    for r in rows:
        if r + 1 < len(meta.starts):
            lens[r] = meta.lens[r]
            slots[meta.starts[r] : meta.starts[r + 1]] = meta.slot_mapping[meta.starts[r] : meta.starts[r + 1]]
    flags = torch.full_like(lens, int(prompt))
    longest = meta.max_query_len if prompt else MAX_QUERY_TOKENS
    return DecodeBatch(meta.block_table, lens, meta.query_start_loc, slots, flags, meta.num_actual_tokens, longest)


# The CPU kernels store K in an order of their own inside a page. It is found by asking them, not by assuming it.
@lru_cache
def _stores_keys_transposed(dtype: torch.dtype, page: int, dim: int) -> bool:
    """True if the CPU kernel stores K of a page [D, P]; False if [P, D]."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(dtype, page, dim)
    # A generator of our own: the engine's random state is for sampling.
    keys = torch.randn(page, 1, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    probe = torch.zeros(1, 1, 2 * page, dim, dtype=dtype)
    k, v = probe.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        keys, keys, k, v, torch.arange(page), isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    plain = keys[:, 0]
    if torch.equal(v[0, 0], plain):
        if torch.equal(k[0, 0].reshape(dim, page), plain.t()):
            return True
        if torch.equal(k[0, 0], plain):
            return False
    raise RuntimeError(
        f"the CPU attention kernel '{isa}' stores pages of {page} tokens in an order that sparse attention cannot "
        "read; run without --plugins on this CPU."
    )


def cache_views(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a CPU cache [num_pages, H, P, 2 * D] as views [num_pages, H, P, D]."""
    pages, heads, page, width = kv_cache.shape
    planes = kv_cache.view(pages, heads, 2 * page, width // 2)
    k, v = planes.chunk(2, dim=2)
    if _stores_keys_transposed(kv_cache.dtype, page, width // 2):
        s0, s1, _, _ = k.stride()
        k = k.as_strided((pages, heads, page, width // 2), (s0, s1, 1, page), k.storage_offset())
    return k, v
