"""Heads that read everything beside heads that read a list: the stages of LycheeDecode. One launch a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ext.attention_backends import role_file
from vllm_ext.attention_backends.lychee import Lychee
from vllm_ext.attention_backends.rope import model_shape
from vllm_ext.attention_backends.stages import DecodeBatch, Read, StageDims, Stages, keys_listed
from vllm_ext.kernels import reference_lychee
from vllm_ext.kernels.mixed_decode import PROGRAMS, MixedBuffers, mixed_decode


class LycheeStages(Stages):
    """The roles of this rank's heads, and one set of lists that the layers of a step write and read in turn.

    Nothing outlives a step: the group's first layer writes the lists of every head. With `others` = "recent" no list is
    written.
    """

    method: Lychee

    def __init__(self, method: Lychee, dims: StageDims) -> None:
        super().__init__(method, dims)
        file = (
            method.file(model_shape(dims.vllm_config.model_config.hf_text_config))
            if dims.vllm_config
            else role_file.read(method.roles or "")
        )
        heads = slice(dims.tp_rank * dims.num_kv_heads, (dims.tp_rank + 1) * dims.num_kv_heads)
        whole = method.map(file)
        self.roles = {layer: list(whole[layer][heads]) for layer in dims.layers}
        self.recent = method.others == "recent"
        if not self.recent:
            self.roles[dims.layers[0]] = [True] * dims.num_kv_heads
        self.carried: dict[int, Tensor] = {}

    def allocate(self) -> None:
        d, method = self.dims, self.method
        pages = -(-d.max_model_len // method.page_size)
        programs = PROGRAMS if torch.device(d.device).type == "cuda" else 8
        self.buffers = MixedBuffers.allocate(
            d.max_requests, d.num_kv_heads, d.rows, d.head_size, pages, method.capacity, self.stats, programs
        )
        self.role = {k: torch.tensor(v, dtype=torch.int32, device=d.device) for k, v in self.roles.items()}

    def decode(
        self, layer: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, batch: DecodeBatch,
        out: Tensor, scale: float,
    ) -> None:  # fmt: skip
        method = self.method
        mixed_decode(
            query, k_cache, v_cache, batch.block_table, batch.seq_lens, batch.query_start_loc, batch.always_dense,
            batch.slot_mapping, self.role[layer], out, self.buffers, max_query_len=batch.max_query_len, scale=scale,
            dense_limit=method.dense_limit, capacity=method.capacity, sink=method.sink, local=method.local,
            choose=any(self.roles[layer]) and not self.recent, recent=self.recent,
        )  # fmt: skip

    def reference_decode(
        self, layer: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, batch: DecodeBatch,
        out: Tensor, scale: float,
    ) -> None:  # fmt: skip
        method, heads, page = self.method, k_cache.shape[1], k_cache.shape[2]
        for row in self.rows(batch, page):
            q = query[row.tokens]
            if row.dense:
                out[row.tokens] = self.reference_attend(layer, row, q, k_cache, v_cache, None, Read(0), scale)
                self.count(row.n, heads, None)
                continue
            role, count = self.roles[layer], row.pages.numel()
            given = (q, k_cache, v_cache, row.pages, row.n, scale, role)
            if self.recent:
                ids = reference_lychee.recent_pages(count, method.capacity, method.sink)
                lists: Tensor | None = ids.to(q.device).expand(heads, -1)
                out[row.tokens] = reference_lychee.attend(*given, lists)
            else:
                lists = self.carried.get(row.number)
                out[row.tokens], self.carried[row.number] = reference_lychee.step(
                    *given, lists, method.capacity, method.sink, method.local
                )
            read = Read(0)
            for h, everything in enumerate(role):
                read.keys_read += row.n if everything else keys_listed(lists[h : h + 1], row, page)  # type: ignore[index]
                read.pages_read += count if everything else lists.shape[1]  # type: ignore[union-attr]
            self.count(row.n, heads, read)
