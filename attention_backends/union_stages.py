"""Pages chosen by each query token alone and read by all of them: the stages of RetroAttention."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ext.attention_backends.stages import DecodeBatch, PageLists, Read, Row, Stages
from vllm_ext.kernels import page_union, reference
from vllm_ext.kernels.score_select import SelectBuffers, score_select
from vllm_ext.kernels.sparse_decode import DecodeBuffers


class UnionStages(Stages):
    """Expand to one-token requests, select, join, attend: four launches; two where a step has one token a request."""

    def allocate(self) -> None:
        d, method = self.dims, self.method
        if d.max_query_len == 1:
            super().allocate()
            return
        pages, tokens = -(-d.max_model_len // method.page_size), d.max_requests * d.max_query_len
        longest = min(pages, d.max_query_len * method.capacity)
        unused = torch.zeros_like(self.stats)  # tokens are no requests: the union counts
        self.each = SelectBuffers.allocate(
            tokens, d.num_kv_heads, d.group, pages, method.capacity, method.group, d.device, unused
        )
        self.union = page_union.UnionBuffers.allocate(d.max_requests, tokens, d.num_kv_heads, pages, longest, d.device)
        self.partials = DecodeBuffers.allocate(d.max_requests, d.num_kv_heads, d.rows, d.head_size, d.device)

    def select(
        self, layer: int, query: Tensor, k_cache: Tensor, index: Tensor | None, batch: DecodeBatch, scale: float
    ) -> PageLists:
        if self.dims.max_query_len == 1:
            return super().select(layer, query, k_cache, index, batch, scale)
        method, b = self.method, batch
        table, lens, start, dense = page_union.expand(
            b.block_table, b.seq_lens, b.query_start_loc, b.always_dense, b.tokens, self.union,
            dense_limit=method.dense_limit, page=method.page_size,
        )  # fmt: skip
        ids, _, counts = score_select(
            query, k_cache, index, table, lens, start, dense, b.slot_mapping, self.each, max_query_len=1, scale=scale,
            dense_limit=0, capacity=method.capacity, sink=method.sink, local=method.local, score=method.score,
            group=method.group, radius=method.radius, index_kind=method.index,
        )  # fmt: skip
        return PageLists(*page_union.page_union(
            ids, counts, b.block_table, b.seq_lens, b.query_start_loc, b.slot_mapping, self.union, self.stats,
            method.page_size,
        ))  # fmt: skip

    def reference_select(
        self, layer: int, row: Row, q: Tensor, k_cache: Tensor, index: Tensor | None, scale: float
    ) -> tuple[Tensor, Read]:
        lists = []
        for t in range(row.m):
            n = row.n - row.m + 1 + t
            pages = row.pages[: reference.page_count(n, k_cache.shape[2])]
            one = Row(row.number, slice(t, t + 1), n, pages, False)
            lists.append(super().reference_select(layer, one, q[t : t + 1], k_cache, index, scale)[0])
        ids = page_union.reference_union(lists)
        heads, page = ids.shape[0], k_cache.shape[2]
        listed = int((ids >= 0).sum())
        keys = listed * page - heads * (row.pages.numel() * page - row.n)
        return ids, Read(keys, row.m * heads * row.pages.numel(), listed)

    def reference_attend(
        self, layer: int, row: Row, q: Tensor, k_cache: Tensor, v_cache: Tensor, ids: Tensor | None, read: Read,
        scale: float,
    ) -> Tensor:  # fmt: skip
        if ids is None:
            return reference.sparse_attention(q, k_cache, v_cache, row.pages, None, row.n, scale)[0]
        hidden = torch.where(ids < 0, -torch.inf, 0.0)  # heads with a shorter union
        return reference.sparse_attention(q, k_cache, v_cache, row.pages, ids.clamp(min=0), row.n, scale, hidden)[0]
