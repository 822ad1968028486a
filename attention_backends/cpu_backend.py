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
from vllm_ext.attention_backends.support import MAX_QUERY_TOKENS, active_method, index_view, mark_layers, padded_spec
from vllm_ext.kernels import reference
from vllm_ext.metrics import Counters, Exporter


@dataclass
class SparseCPUMetadata(CPUAttentionMetadata):
    """Stock metadata plus the rows that decode sparsely in this step."""

    sparse_rows: list[int] = field(default_factory=list)
    dense_rows: list[int] = field(default_factory=list)
    lens: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counters: Counters | None = None


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
        self.counters = Counters(scale=max(1, len(self.sparse_layers)) * kv_cache_spec.num_kv_heads)
        self.exporter = Exporter(vllm_config, layer_names[0])

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SparseCPUMetadata:
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        self.exporter.write(self.counters)  # of the steps before this one
        meta = SparseCPUMetadata(**vars(stock), counters=self.counters)
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
        self._count_dense(meta, kv_cache.shape[1])
        if len(meta.sparse_rows) < meta.seq_lens.shape[0]:
            super().forward(layer, query, key, value, kv_cache, meta, output, output_scale, output_block_scale)
        if meta.sparse_rows:
            self._sparse(method, query, kv_cache, meta, output)
        return output

    def _sparse(
        self, method: SparseMethod, query: torch.Tensor, kv_cache: torch.Tensor, meta: Any, output: torch.Tensor
    ) -> None:
        keys, values = cache_views(kv_cache)
        index = index_view(kv_cache, method, self.head_size)
        out = output.view(-1, self.num_heads, self.head_size)
        q = query.view(-1, self.num_heads, self.head_size)
        chosen = set(meta.sparse_rows)
        report = reference.sparse_decode_step(
            q,
            keys,
            values,
            index,
            meta.block_table,
            [n if r in chosen else 0 for r, n in enumerate(meta.lens)],  # the step skips requests without keys
            meta.starts,
            scale=self.scale,
            score=method.score,
            group=method.group,
            radius=method.radius,
            capacity=method.capacity,
            sink=method.sink,
            local=method.local,
            dense=[False] * len(meta.lens),
            out=out,
        )
        heads = kv_cache.shape[1]
        for r in meta.sparse_rows:
            scored, selected, read = report[r]
            meta.counters.add_sparse(read, heads * meta.lens[r], scored, selected, heads)

    def _count_dense(self, meta: Any, heads: int) -> None:
        for r in meta.dense_rows:
            meta.counters.add_dense(heads * meta.lens[r], heads)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write the new keys and values, then refresh the index of the pages they complete."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.method is not None and self.method.index != "none":
            index = index_view(kv_cache, self.method, self.head_size)
            assert index is not None
            keys, _ = cache_views(kv_cache)
            reference.update_index(keys, index, slot_mapping, self.method.index)


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
