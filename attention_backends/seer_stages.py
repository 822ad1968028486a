"""The stages of SeerAttention-R. Three launches a step: gate, score and select, attend."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ext.attention_backends.gate_file import PARTS, GateFile
from vllm_ext.attention_backends.rope import inverse_frequencies, model_shape
from vllm_ext.attention_backends.seer import Seer
from vllm_ext.attention_backends.stages import DecodeBatch, PageLists, Read, Row, StageDims, Stages, keys_listed
from vllm_ext.kernels import gate, reference, reference_gate
from vllm_ext.kernels.score_select import score_select


class SeerStages(Stages):
    """The gates of this rank's KV heads, and buffers for gate queries."""

    method: Seer

    def __init__(self, method: Seer, dims: StageDims) -> None:
        super().__init__(method, dims)
        file = self._file(method, dims)
        self.width = file.width
        rope = model_shape(dims.vllm_config.model_config.hf_text_config).rope if dims.vllm_config else None
        rope = rope or file.notes["model"]["rope"]
        self.inv_freq = torch.tensor(inverse_frequencies(rope, dims.head_size), device=dims.device)
        self.gate_freq = torch.tensor(inverse_frequencies(rope, self.width), device=dims.device)
        # the references run where there is no GPU, in fp32 throughout
        dtype = torch.float32 if torch.device(dims.device).type == "cpu" else dims.dtype
        first = dims.tp_rank * dims.num_kv_heads
        self.gates: dict[int, dict[str, Tensor]] = {}
        for layer in dims.layers:
            found = file.load(layer, first, dims.num_kv_heads)
            self.gates[layer] = {part: found[part].to(dims.device, dtype) for part in PARTS}

    @staticmethod
    def _file(method: Seer, dims: StageDims) -> GateFile:
        from vllm_ext.attention_backends import gate_file

        if dims.vllm_config is None:
            assert method.gates is not None
            return gate_file.read(method.gates)
        return method.file(model_shape(dims.vllm_config.model_config.hf_text_config))

    @property
    def page_bytes(self) -> int:
        return self.width * self.dims.dtype.itemsize

    # ------------------------------------------------------------------------------------------------ kernels
    def allocate(self) -> None:
        super().allocate()
        d = self.dims
        order = gate.paired(self.width, 2 * self.gate_freq.numel())
        self.ordered = {
            layer: {part: g[part][..., order.to(g[part].device)].contiguous() for part in PARTS}
            for layer, g in self.gates.items()
        }
        self.rope = gate.table(self.inv_freq, d.max_model_len, self.inv_freq.numel())
        self.gate_rope = gate.table(self.gate_freq, d.max_model_len, self.width // 2)
        self.queries = torch.zeros(
            d.max_requests * d.max_query_len, d.num_kv_heads, self.width, dtype=d.dtype, device=d.device
        )

    def _gate(
        self, layer: int, query: Tensor | None, k_cache: Tensor, index: Tensor | None, batch: DecodeBatch
    ) -> Tensor:
        assert index is not None
        g = self.ordered[layer]
        gate.gate_step(
            query, k_cache, index, g["q"], g["k"], g["q_norm"], g["k_norm"], self.queries, self.rope, self.gate_rope,
            batch.seq_lens, batch.query_start_loc, batch.slot_mapping, max_query_len=batch.max_query_len,
        )  # fmt: skip
        return self.queries[: batch.tokens]

    def select(
        self, layer: int, query: Tensor, k_cache: Tensor, index: Tensor | None, batch: DecodeBatch, scale: float
    ) -> PageLists:
        method = self.method
        queries = self._gate(layer, query, k_cache, index, batch)
        lists = PageLists(*score_select(
            queries, k_cache, index, batch.block_table, batch.seq_lens, batch.query_start_loc, batch.always_dense,
            batch.slot_mapping, self.lists, max_query_len=batch.max_query_len, scale=self.width**-0.5,
            dense_limit=method.dense_limit, capacity=method.capacity, sink=method.sink, local=method.local,
            score="dot", group="max", index_kind="none",
        ))  # fmt: skip
        if method.threshold > 0:
            gate.drop_below(
                self.lists.scores, lists.ids, lists.pages, lists.counts, self.stats, batch.seq_lens,
                batch.query_start_loc, batch.slot_mapping, page=method.page_size, threshold=method.threshold,
                sink=method.sink, local=method.local,
            )  # fmt: skip
        return lists

    def write_index(
        self, layer: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, batch: DecodeBatch,
        scale: float,
    ) -> None:  # fmt: skip
        self._gate(layer, None, k_cache, index, batch)

    # --------------------------------------------------------------------------------------------- references
    def reference_select(
        self, layer: int, row: Row, q: Tensor, k_cache: Tensor, index: Tensor | None, scale: float
    ) -> tuple[Tensor, Read]:
        assert index is not None
        method, page, heads, g = self.method, k_cache.shape[2], k_cache.shape[1], self.gates[layer]
        asks = reference_gate.queries(q, row.n, g["q"], g["q_norm"], self.inv_freq, self.gate_freq)
        keys = index[row.pages].flatten(2)[..., : self.width]
        scores = reference_gate.page_scores(asks, keys, row.n, page)
        ids = reference.select_pages(scores, row.n, row.m, page, method.capacity, method.sink, method.local)
        read = Read(keys_listed(ids, row, page), heads * row.pages.numel(), ids.numel())
        if method.threshold > 0:
            first, last = reference.forced_pages(row.n, row.m, page, method.sink, method.local)
            lists = reference_gate.above_threshold(scores, ids, method.threshold, first, last)
            dropped = ids.numel() - sum(x.numel() for x in lists)
            read.keys_read -= dropped * page
            read.pages_read -= dropped
            ids = torch.full_like(ids, -1)
            for h, kept in enumerate(lists):
                ids[h, : kept.numel()] = kept
        return ids, read

    def reference_attend(
        self, layer: int, row: Row, q: Tensor, k_cache: Tensor, v_cache: Tensor, ids: Tensor | None, read: Read,
        scale: float,
    ) -> Tensor:  # fmt: skip
        if ids is None or not self.method.threshold:
            return reference.sparse_attention(q, k_cache, v_cache, row.pages, ids, row.n, scale)[0]
        # lists of different lengths: their empty tails are masked
        mask = torch.where(ids < 0, 0, -1).to(torch.int32)
        return reference.sparse_attention(
            q, k_cache, v_cache, row.pages, ids.clamp(min=0), row.n, scale, row_mask=mask
        )[0]

    def reference_index(
        self, layer: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, batch: DecodeBatch,
        scale: float,
    ) -> None:  # fmt: skip
        assert index is not None
        page, g = k_cache.shape[2], self.gates[layer]
        for row in self.rows(batch, page):
            for number in range((row.n - row.m) // page, row.n // page):
                at = int(row.pages[number])
                record = reference_gate.page_record(
                    k_cache[at], number * page, g["k"], g["k_norm"], self.inv_freq, self.gate_freq
                )
                index[at].flatten(1)[:, : self.width] = record.to(index.dtype)
