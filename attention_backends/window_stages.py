"""Pages chosen by window scores: the stages of InfLLM-V2."""

from __future__ import annotations

from torch import Tensor

from vllm_ext.attention_backends.stages import DecodeBatch, PageLists, Read, Row, Stages, keys_listed
from vllm_ext.kernels import reference, reference_windows
from vllm_ext.kernels.sparse_decode import DecodeBuffers
from vllm_ext.kernels.window_select import WindowBuffers, update_windows, window_select


class WindowStages(Stages):
    """Two launches choose the pages, a third attends to them."""

    def allocate(self) -> None:
        d, method = self.dims, self.method
        pages = -(-d.max_model_len // method.page_size)
        self.windows = WindowBuffers.allocate(
            d.max_requests, d.num_kv_heads, d.rows, pages, method.capacity, d.device, self.stats
        )
        self.partials = DecodeBuffers.allocate(d.max_requests, d.num_kv_heads, d.rows, d.head_size, d.device)

    def select(
        self, layer: int, query: Tensor, k_cache: Tensor, index: Tensor | None, batch: DecodeBatch, scale: float
    ) -> PageLists:
        assert index is not None
        method = self.method
        return PageLists(*window_select(
            query, k_cache, index, batch.block_table, batch.seq_lens, batch.query_start_loc, batch.always_dense,
            batch.slot_mapping, self.windows, max_query_len=batch.max_query_len, scale=scale,
            dense_limit=method.dense_limit, capacity=method.capacity, sink=method.sink, local=method.local,
        ))  # fmt: skip

    def write_index(
        self, layer: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, batch: DecodeBatch,
        scale: float,
    ) -> None:  # fmt: skip
        assert index is not None
        update_windows(k_cache, index, batch.block_table, batch.seq_lens, batch.query_start_loc, batch.max_query_len)

    def reference_select(
        self, layer: int, row: Row, q: Tensor, k_cache: Tensor, index: Tensor | None, scale: float
    ) -> tuple[Tensor, Read]:
        assert index is not None
        method, page, heads = self.method, k_cache.shape[2], k_cache.shape[1]
        s = reference_windows.window_scores(q, index, row.pages, row.n, page, scale)
        ids = reference.select_pages(s, row.n, row.m, page, method.capacity, method.sink, method.local)
        return ids, Read(keys_listed(ids, row, page), heads * ((row.n - row.m) // page), ids.numel())

    def reference_index(
        self, layer: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, batch: DecodeBatch,
        scale: float,
    ) -> None:  # fmt: skip
        assert index is not None
        page = k_cache.shape[2]
        for row in self.rows(batch, page):
            first, end = (row.n - row.m) // page, row.n // page
            reference_windows.update_windows(k_cache, index, row.pages, first, end)
