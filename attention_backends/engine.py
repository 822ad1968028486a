"""The per-step pipeline of the sparse backend on a GPU: score, select, attend, over buffers allocated once.

    index  (K1)  the record of a page lives behind the page and is written when the page is complete
    score  (K2)  } one launch, `kernels.score_select`
    select (K3)  }
    attend (K4)  } one launch, `kernels.sparse_decode`
    merge  (K5)  }

Nothing here looks at a length on the host, so a captured graph replays for any lengths: dense requests (short ones, and
prompts that are still being prefilled) and sparse ones share both launches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_ext.attention_backends.method import SparseMethod
from vllm_ext.kernels.score_select import SelectBuffers, score_select
from vllm_ext.kernels.sparse_decode import DecodeBuffers, sparse_decode


@dataclass
class DecodeBatch:
    """The decode rows of a step; they come first in the batch.

    block_table [R, pages] int32, seq_lens [R] int32, query_start_loc [R + 1] int32, slot_mapping [T] int64,
    always_dense [R] int32 (nonzero: the row belongs to a prompt), all on the device; `tokens` = T; `max_query_len` is a
    constant of the captured graph.
    """

    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    slot_mapping: Tensor
    always_dense: Tensor
    tokens: int
    max_query_len: int


class SparseEngine:
    """Scratch of all sparse layers of one KV-cache group, and the two launches of a decode step."""

    def __init__(
        self,
        method: SparseMethod,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        max_requests: int,
        max_model_len: int,
        max_query_len: int,
        device: torch.device,
    ) -> None:
        self.method = method
        rows = max_query_len * (num_heads // num_kv_heads)
        pages = -(-max_model_len // method.page_size)
        self.select = SelectBuffers.allocate(
            max_requests, num_kv_heads, rows, pages, method.capacity, method.group, device
        )
        self.decode = DecodeBuffers.allocate(max_requests, num_kv_heads, rows, head_size, device)
        self.always_dense = torch.zeros(max_requests, dtype=torch.int32, device=device)

    def forward(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, batch: DecodeBatch, out: Tensor,
        scale: float,
    ) -> None:  # fmt: skip
        """Attention of the decode rows.

        Args:
            query, out: [T, Hq, D]; k_cache, v_cache: [num_pages, H, P, D] views; index: see `support.index_view`.
        """
        m, method = batch.max_query_len, self.method
        _, pages, counts = score_select(
            query, k_cache, index, batch.block_table, batch.seq_lens, batch.query_start_loc, batch.always_dense,
            batch.slot_mapping, self.select,
            max_query_len=m, scale=scale, dense_limit=method.dense_limit, capacity=method.capacity, sink=method.sink,
            local=method.local, score=method.score, group=method.group, radius=method.radius, index_kind=method.index,
        )  # fmt: skip
        sparse_decode(
            query, k_cache, v_cache, batch.block_table, batch.seq_lens, batch.query_start_loc, pages, counts, out,
            self.decode, max_query_len=m, scale=scale,
        )  # fmt: skip
