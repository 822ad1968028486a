"""Stages of Tactic: scores, ranks, probes, lists by mass, attention: five launches a layer."""

from __future__ import annotations

from torch import Tensor

from vllm_ext.attention_backends.stages import DecodeBatch, PageLists, Read, Row, Stages
from vllm_ext.attention_backends.tactic import Tactic
from vllm_ext.kernels import reference_clusters
from vllm_ext.kernels.mass_select import MassBuffers, mass_select, probe_room
from vllm_ext.kernels.page_clusters import update_clusters
from vllm_ext.kernels.reference import grouped
from vllm_ext.kernels.reference_mass import select_mass
from vllm_ext.kernels.sparse_decode import DecodeBuffers


class TacticStages(Stages):
    """Lists of a length that each step chooses, within fixed buffers."""

    method: Tactic

    @property
    def page_bytes(self) -> int:
        """Of a record of clusters, the centroids and counts."""
        d, clusters = self.dims, self.method.clusters
        return d.dtype.itemsize * clusters * (d.head_size + 1) if clusters else super().page_bytes

    def allocate(self) -> None:
        """Scores and ranks of every page, probes, and the lists."""
        d, method = self.dims, self.method
        pages = -(-d.max_model_len // method.page_size)
        probes = probe_room(method.target, pages, method.page_size, d.max_query_len, method.sink, method.local)
        self.mass = MassBuffers.allocate(
            d.max_requests, d.num_kv_heads, d.rows, pages, method.capacity, probes, d.device
        )
        self.partials = DecodeBuffers.allocate(d.max_requests, d.num_kv_heads, d.rows, d.head_size, d.device)

    def select(
        self, layer: int, query: Tensor, k_cache: Tensor, index: Tensor | None, batch: DecodeBatch, scale: float
    ) -> PageLists:
        """The fewest pages that reach the mass."""
        method = self.method
        assert index is not None
        return PageLists(*mass_select(
            query, k_cache, index, batch.block_table, batch.seq_lens, batch.query_start_loc, batch.always_dense,
            batch.slot_mapping, self.stats, self.mass, method.target, max_query_len=batch.max_query_len, scale=scale,
            dense_limit=method.dense_limit, capacity=method.capacity, sink=method.sink, local=method.local,
            clusters=method.clusters, iterations=method.iterations,
        ))  # fmt: skip

    def write_index(
        self, layer: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, batch: DecodeBatch,
        scale: float,
    ) -> None:  # fmt: skip
        """Mean keys, or clusters."""
        method = self.method
        if index is not None and method.clusters:
            update_clusters(k_cache, index, batch.slot_mapping, method.clusters, method.iterations)
        else:
            super().write_index(layer, query, k_cache, v_cache, index, batch, scale)

    def reference_index(
        self, layer: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, batch: DecodeBatch,
        scale: float,
    ) -> None:  # fmt: skip
        """`write_index` in plain torch."""
        method = self.method
        if index is not None and method.clusters:
            reference_clusters.update(k_cache, index, batch.slot_mapping, method.clusters, method.iterations)
        else:
            super().reference_index(layer, query, k_cache, v_cache, index, batch, scale)

    def reference_select(
        self, layer: int, row: Row, q: Tensor, k_cache: Tensor, index: Tensor | None, scale: float
    ) -> tuple[Tensor, Read]:
        """Lists of different lengths: the tails are -1."""
        method, page, heads = self.method, k_cache.shape[2], k_cache.shape[1]
        assert index is not None
        records, rows = index[row.pages].transpose(0, 1), grouped(q, heads)
        if method.clusters:
            scores = reference_clusters.scores(rows, records, row.n // page, scale)
        else:
            scores = rows @ records[:, :, 0].float().transpose(1, 2) * scale
        ids, counts, probed, cut = select_mass(
            q, k_cache, scores, row.pages, row.n, scale, method.capacity, method.sink, method.local, method.target
        )
        listed = int(counts.sum())
        tails = heads * (row.pages.numel() * page - row.n)
        probed *= page * k_cache.shape[3] * k_cache.element_size()
        return ids, Read(listed * page - tails, heads * row.pages.numel(), listed, probed, cut)
