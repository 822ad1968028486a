"""Stages of RESA: the host's list, then one launch that attends, adds the prior and extends it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_ext.attention_backends.hosted_stages import HostedStages
from vllm_ext.attention_backends.request_slots import RequestSlots
from vllm_ext.attention_backends.resa import Resa
from vllm_ext.attention_backends.stages import DecodeBatch, Read, Row, StageDims, request_counts
from vllm_ext.kernels import reference, reference_residual
from vllm_ext.kernels.reference_residual import Prior
from vllm_ext.kernels.residual_decode import PriorState, ResidualBuffers, residual_decode
from vllm_ext.kernels.sparse_decode import sparse_decode


class ResaStages(HostedStages):
    """Priors by layer and request slot; kernels and references share their layout."""

    method: Resa

    def __init__(self, method: Resa, dims: StageDims) -> None:
        super().__init__(method, dims)
        d = dims
        self.slots = RequestSlots(method.slots, method.page_size, d.device)
        self.priors = {
            layer: PriorState.allocate(method.slots, d.num_kv_heads, d.group, d.head_size, d.dtype, d.device)
            for layer in d.layers
        }
        self.state = torch.zeros(0, dtype=torch.int64)
        self.chunk = (self.state, self.state, self.state)
        self.log_weight = math.log(method.lambda_) if method.lambda_ else -math.inf
        self.gate = -math.inf if method.gate is None else method.gate

    def allocate(self) -> None:
        """Partials of both queries."""
        super().allocate()
        d = self.dims
        self.buffers = ResidualBuffers.allocate(d.max_requests, d.num_kv_heads, d.rows, d.head_size, d.device)

    def begin(self, layer: int, k_cache: Tensor, batch: DecodeBatch) -> Tensor:
        """Slots of the decode rows, found in the first layer of a step."""
        if layer == self.dims.layers[0]:
            self.slots.fit(k_cache.shape[0])
            self.state = self.slots.decode(batch)
        return self.state

    def decode(
        self, layer: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, batch: DecodeBatch,
        out: Tensor, scale: float,
    ) -> None:  # fmt: skip
        """List, then attention with the prior."""
        state = self.begin(layer, k_cache, batch)
        lists = self.select(layer, query, k_cache, index, batch, scale)
        residual_decode(
            query, k_cache, v_cache, batch.block_table, batch.seq_lens, batch.query_start_loc, batch.slot_mapping,
            lists.ids, lists.pages, lists.counts, state, self.priors[layer], out, self.buffers,
            log_weight=self.log_weight, gate=self.gate, max_query_len=batch.max_query_len, scale=scale,
        )  # fmt: skip

    def mean_queries(self, layer: int, query: Tensor, k_cache: Tensor, batch: DecodeBatch) -> tuple[Tensor, Tensor]:
        """Add the queries of prompt chunks to their requests: (slots [R], which requests get a prior [R] bool)."""
        if layer == self.dims.layers[0]:
            self.slots.fit(k_cache.shape[0])
            token = torch.arange(query.shape[0], device=query.device)
            start = batch.query_start_loc[:, None]
            used = (token >= start[:-1]) & (token < start[1:]) & (batch.slot_mapping[: len(token)] >= 0)
            self.chunk = (*self.slots.prompt(batch), used.float())
        slots, source, used = self.chunk  # used [R, T]: which queries are a request's
        prior = self.priors[layer]
        inherited = source < self.method.slots
        total = torch.where(inherited[:, None, None, None], prior.total[source], 0.0)
        # a product: adding rows by index is not deterministic on a GPU
        total = total + (used @ query.float().flatten(1)).view_as(total)
        count = torch.where(inherited, prior.queries[source], 0.0) + used.sum(1)
        prior.total[slots], prior.queries[slots] = total, count
        prior.mu[slots] = (total / count.clamp(min=1)[:, None, None, None]).to(prior.mu.dtype)
        enough = (count >= self.method.min_queries) & (slots < self.method.slots)
        prior.covered[slots] = torch.where(enough, batch.seq_lens // k_cache.shape[2], 0)[:, None].to(torch.int32)
        return slots, enough

    def write_index(
        self, layer: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, batch: DecodeBatch,
        scale: float,
    ) -> None:  # fmt: skip
        """The host's index, and the priors of the chunk's requests: one query row over all complete pages."""
        super().write_index(layer, query, k_cache, v_cache, index, batch, scale)
        slots, _ = self.mean_queries(layer, query, k_cache, batch)
        prior = self.priors[layer]
        mu = prior.mu[slots].flatten(1, 2)
        whole = batch.seq_lens // k_cache.shape[2] * k_cache.shape[2]
        shared, level = self._over_pages(mu, k_cache, v_cache, batch.block_table, whole, scale)
        prior.shared[slots], prior.level[slots] = shared, level
        mean_key, _ = self._over_pages(torch.zeros_like(mu), k_cache, k_cache, batch.block_table, whole, scale)
        prior.mean_key[slots] = mean_key[:, :, 0]

    def _over_pages(
        self, q: Tensor, k_cache: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention of one query row a request, q [R, Hq, D], over every page: ([R, H, G, D], LSE [R, H, G]), fp32."""
        rows, heads = q.shape[0], k_cache.shape[1]
        ints = {"dtype": torch.int32, "device": q.device}
        every, lists = torch.full((rows, heads), reference.EVERY_PAGE, **ints), torch.zeros(rows, heads, 1, **ints)
        result, level = torch.zeros(q.shape, device=q.device), torch.zeros(q.shape[:2], device=q.device)
        sparse_decode(
            q, k_cache, values, block_table, lengths, torch.arange(rows + 1, **ints), lists, every, result,
            self.partials, max_query_len=1, scale=scale, lse=level,
        )  # fmt: skip
        return result.view(rows, heads, -1, q.shape[2]), level.view(rows, heads, -1)

    def warm_up(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, block_table: Tensor, scale: float
    ) -> None:
        """Also what prompts launch."""
        super().warm_up(query, k_cache, v_cache, index, block_table, scale)
        for rows in request_counts(self.dims.max_requests, self.dims.num_kv_heads):
            q = torch.zeros((rows, *query.shape[1:]), dtype=self.dims.dtype, device=query.device)
            ints = torch.zeros((rows, block_table.stride(0)), dtype=torch.int32, device=query.device)
            lengths = torch.zeros(rows, dtype=torch.int32, device=query.device)
            self._over_pages(q, k_cache, v_cache, ints[:, : block_table.shape[1]], lengths, scale)

    def reference_index(
        self, layer: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, batch: DecodeBatch,
        scale: float,
    ) -> None:  # fmt: skip
        """The same, request by request; decode rows keep their prior."""
        super().reference_index(layer, query, k_cache, v_cache, index, batch, scale)
        if not bool(batch.always_dense.all()):
            self.begin(layer, k_cache, batch)
            return
        slots, enough = self.mean_queries(layer, query, k_cache, batch)
        prior = self.priors[layer]
        for r, (s, n) in enumerate(zip(slots.tolist(), batch.seq_lens.tolist())):
            if n and enough[r]:
                pages = batch.block_table[r].long()
                mu = prior.mu[s].flatten(0, 1)
                self._store(layer, s, reference_residual.make_prior(mu, k_cache, v_cache, pages, n, scale))

    def reference_attend(
        self, layer: int, row: Row, q: Tensor, k_cache: Tensor, v_cache: Tensor, ids: Tensor | None, read: Read,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """Attention over the list and the prior; then the prior grows."""
        s = int(self.state[row.number])
        state, mine = self.priors[layer], None
        if s < self.method.slots and int(state.covered[s, 0]):
            mu, shared = state.mu[s].flatten(0, 1), state.shared[s].flatten(0, 1)
            mine = Prior(mu, shared, state.level[s].flatten(), state.mean_key[s], int(state.covered[s, 0]))
        if ids is None or mine is None:
            out = reference.sparse_attention(q, k_cache, v_cache, row.pages, ids, row.n, scale)[0]
        else:
            out = reference_residual.residual_attention(
                q, k_cache, v_cache, row.pages, ids, row.n, scale, mine, self.method.lambda_, self.gate
            )
        if mine is not None:
            upto = (row.n - row.m) // k_cache.shape[2]
            self._store(layer, s, reference_residual.fold(mine, k_cache, v_cache, row.pages, upto, scale))
        return out

    def _store(self, layer: int, s: int, prior: Prior) -> None:
        state = self.priors[layer]
        state.shared[s], state.level[s] = prior.out.view_as(state.shared[s]), prior.lse.view_as(state.level[s])
        state.mean_key[s], state.covered[s] = prior.mean_key, prior.covered
