"""Stages of Tactic: scores, lists by mass, attention: three launches a layer."""

from __future__ import annotations

from torch import Tensor

from vllm_ext.attention_backends.stages import DecodeBatch, PageLists, Read, Row, Stages
from vllm_ext.attention_backends.tactic import Tactic
from vllm_ext.kernels.mass_select import MassBuffers, mass_select
from vllm_ext.kernels.reference import grouped
from vllm_ext.kernels.reference_mass import select_mass
from vllm_ext.kernels.sparse_decode import DecodeBuffers


class TacticStages(Stages):
    """Lists of a length that each step chooses, within fixed buffers."""

    method: Tactic

    def allocate(self) -> None:
        """Scores, masses and probes of every page, and the lists."""
        d, method = self.dims, self.method
        pages = -(-d.max_model_len // method.page_size)
        self.mass = MassBuffers.allocate(d.max_requests, d.num_kv_heads, d.rows, pages, method.capacity, d.device)
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
        ))  # fmt: skip

    def reference_select(
        self, layer: int, row: Row, q: Tensor, k_cache: Tensor, index: Tensor | None, scale: float
    ) -> tuple[Tensor, Read]:
        """Lists of different lengths: the tails are -1."""
        method, page, heads = self.method, k_cache.shape[2], k_cache.shape[1]
        assert index is not None
        means = index[row.pages].transpose(0, 1)[:, :, 0].float()
        scores = grouped(q, heads) @ means.transpose(1, 2) * scale
        ids, counts, probed, cut = select_mass(
            q, k_cache, scores, row.pages, row.n, scale, method.capacity, method.sink, method.local, method.target
        )
        listed = int(counts.sum())
        tails = heads * (row.pages.numel() * page - row.n)
        probed *= page * k_cache.shape[3] * k_cache.element_size()
        return ids, Read(listed * page - tails, heads * row.pages.numel(), listed, probed, cut)
