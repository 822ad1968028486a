"""Stages of vAttention: four launches a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ext.attention_backends.hosted_stages import HostedStages
from vllm_ext.attention_backends.stages import DecodeBatch, Read, Row
from vllm_ext.attention_backends.vattention import VAttention
from vllm_ext.kernels import reference
from vllm_ext.kernels.reference_sampling import sample_tail, stream
from vllm_ext.kernels.tail_sample import SampleBuffers, tail_sample


class VAttentionStages(HostedStages):
    """The host's list, attention over it with its log-sum-exp, pilot and budget, the rest of the sample."""

    method: VAttention

    def allocate(self) -> None:
        """Partials of the sample, and the log-sum-exp of the list."""
        super().allocate()
        d = self.dims
        self.sample = SampleBuffers.allocate(d.max_requests, d.num_kv_heads, d.rows, d.head_size, d.device)
        tokens = d.max_requests * d.max_query_len
        self.lse = torch.zeros(tokens, d.num_heads, dtype=torch.float32, device=d.device)

    def head_number(self) -> int:
        """The model's number of this rank's first KV head, so that the draws do not depend on the parallel size."""
        return self.dims.tp_rank * self.dims.num_kv_heads

    def decode(
        self, layer: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, batch: DecodeBatch,
        out: Tensor, scale: float,
    ) -> None:  # fmt: skip
        """List, attention, pilot, sample."""
        lists = self.select(layer, query, k_cache, index, batch, scale)
        lse = self.lse[: query.shape[0]]
        self.attend(lists, query, k_cache, v_cache, batch, out, scale, lse)
        tail_sample(
            query, k_cache, v_cache, batch.block_table, batch.seq_lens, batch.query_start_loc, batch.slot_mapping,
            lists.ids, lists.counts, out, lse, self.stats, self.sample, self.method.target, seed=self.method.seed,
            layer=layer, first_head=self.head_number(), max_query_len=batch.max_query_len, scale=scale,
        )  # fmt: skip

    def reference_attend(
        self, layer: int, row: Row, q: Tensor, k_cache: Tensor, v_cache: Tensor, ids: Tensor | None, read: Read,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """Attention over the list and the sampled tail."""
        out, lse = reference.sparse_attention(q, k_cache, v_cache, row.pages, ids, row.n, scale)
        if ids is None:
            return out
        heads = range(self.head_number(), self.head_number() + k_cache.shape[1])
        keys = [stream(self.method.seed, row.n - row.m, layer, h) for h in heads]
        out, drawn, cut = sample_tail(
            q, k_cache, v_cache, row.pages, ids, row.n, scale, out, lse, keys, self.method.target
        )
        read.keys_read += sum(drawn)
        read.capped_rows += cut
        return out
