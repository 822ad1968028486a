"""The decode step of a sparse layer: select pages, attend to them. A method that needs more subclasses `Stages`.

    index  (K1)  the record of a page lives behind the page and is written when the page is complete
    score  (K2)  } one launch, `kernels.score_select`
    select (K3)  }
    attend (K4)  } one launch, `kernels.sparse_decode`
    merge  (K5)  }

`select`, `decode` and `write_index` launch kernels, on a GPU or in Triton's interpreter. Nothing there looks at a
length on the host, so a captured graph replays for any lengths: dense requests (short ones, and prompts that are still
being prefilled) and sparse ones share the launches. `reference_select`, `reference_attend` and `reference_index` are
the same in plain torch: the specification of the former, and the product on CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vllm_ext.attention_backends.method import SparseMethod
from vllm_ext.kernels import reference
from vllm_ext.kernels.index_update import update_index
from vllm_ext.kernels.score_select import STATS, SelectBuffers, score_select
from vllm_ext.kernels.sparse_decode import DecodeBuffers, sparse_decode, splits_for
from vllm_ext.kernels.tail_sample import sample_splits


@dataclass(frozen=True)
class StageDims:
    """What buffers are sized by: one KV-cache group on one rank.

    `max_query_len`: most query tokens of a request in a decode step. `dtype`: of the KV cache. `layers`: numbers in the
    model of the group's sparse layers, ascending; every `layer` argument below is one. `vllm_config`: None in tests.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    max_requests: int
    max_model_len: int
    max_query_len: int
    device: torch.device | str
    dtype: torch.dtype = torch.bfloat16
    layers: tuple[int, ...] = (0,)
    tp_rank: int = 0
    tp_size: int = 1
    vllm_config: Any = None

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def rows(self) -> int:
        """Query rows of one KV head in a decode step, at most."""
        return self.max_query_len * self.group


@dataclass
class DecodeBatch:
    """The decode rows of a step; on a GPU they come first in the batch.

    block_table [R, pages] int32, seq_lens [R] int32 (0: no row of this batch), query_start_loc [R + 1] int32,
    slot_mapping [T] int64 (-1: padding), always_dense [R] int32 (nonzero: the row belongs to a prompt), all on the
    device; `tokens` = T; `max_query_len` is a constant of the captured graph.
    """

    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    slot_mapping: Tensor
    always_dense: Tensor
    tokens: int
    max_query_len: int


@dataclass
class PageLists:
    """Pages to read, per request and KV head: `ids`, `pages` [R, H, C] int32, logical ascending and physical; counts.

    `counts` [R, H] int32: entries in use, -1 = every page. The list of a request ends with every page that holds
    one of its query tokens.
    """

    ids: Tensor
    pages: Tensor
    counts: Tensor


@dataclass
class Row:
    """One request of a decode batch, for the references: its number, tokens, keys, physical pages [N]."""

    number: int
    tokens: slice
    n: int
    pages: Tensor
    dense: bool

    @property
    def m(self) -> int:
        """Query tokens."""
        return self.tokens.stop - self.tokens.start


@dataclass
class Read:
    """What one request read in one layer, summed over KV heads; fields as in `vllm_ext.metrics.NAMES`."""

    keys_read: int
    pages_scored: int = 0
    pages_read: int = 0
    select_bytes: int = 0
    capped_rows: int = 0


def request_counts(most: int, heads: int) -> list[int]:
    """Numbers of requests that together make every kernel which steps of up to `most` requests can need.

    Kernels are compiled for a number of splits, and for powers of two.
    """
    found: dict[Any, int] = {}
    for requests in range(1, most + 1):
        pairs = requests * heads
        key = splits_for(pairs), sample_splits(pairs), (pairs - 1).bit_length()
        found.setdefault(key, requests)
    return list(found.values())


class Stages:
    """Top-k pages by the method's index and score; one object for all sparse layers of a KV-cache group.

    Attributes:
        stats: [STATS] int64 on the device, totals in the order of `vllm_ext.metrics.NAMES`, over layers and heads.
    """

    def __init__(self, method: SparseMethod, dims: StageDims) -> None:
        self.method, self.dims = method, dims
        self.warm = False
        self.stats = torch.zeros(STATS, dtype=torch.int64, device=dims.device)

    @property
    def page_bytes(self) -> int:
        """Bytes read to score one page for one KV head."""
        d, size = self.dims, self.dims.dtype.itemsize
        exact = self.method.score == "exact"
        return size * (self.method.page_size * d.head_size if exact else self.method.record_elements(d.head_size))

    # ------------------------------------------------------------------------------------------------ kernels
    def allocate(self) -> None:
        """Allocate the kernels' buffers, once and before any capture; not called where the references run."""
        d, method = self.dims, self.method
        pages = -(-d.max_model_len // method.page_size)
        self.lists = SelectBuffers.allocate(
            d.max_requests, d.num_kv_heads, d.rows, pages, method.capacity, method.group, d.device, self.stats
        )
        self.partials = DecodeBuffers.allocate(d.max_requests, d.num_kv_heads, d.rows, d.head_size, d.device)

    def select(
        self, layer: int, query: Tensor, k_cache: Tensor, index: Tensor | None, batch: DecodeBatch, scale: float
    ) -> PageLists:
        """The lists of one layer; also writes the records of pages that this step completes, and counts.

        Args:
            query: [T, Hq, D]; k_cache: [num_pages, H, P, D] view; index: see `support.index_view`.
        """
        method = self.method
        return PageLists(*score_select(
            query, k_cache, index, batch.block_table, batch.seq_lens, batch.query_start_loc, batch.always_dense,
            batch.slot_mapping, self.lists, max_query_len=batch.max_query_len, scale=scale,
            dense_limit=method.dense_limit, capacity=method.capacity, sink=method.sink, local=method.local,
            score=method.score, group=method.group, radius=method.radius, index_kind=method.index,
        ))  # fmt: skip

    def attend(
        self, lists: PageLists, query: Tensor, k_cache: Tensor, v_cache: Tensor, batch: DecodeBatch, out: Tensor,
        scale: float, lse: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Attention over lists into `out` [T, Hq, D], and its log-sum-exp into `lse` [T, Hq] fp32 if given."""
        sparse_decode(
            query, k_cache, v_cache, batch.block_table, batch.seq_lens, batch.query_start_loc, lists.pages,
            lists.counts, out, self.partials, max_query_len=batch.max_query_len, scale=scale, lse=lse,
        )  # fmt: skip

    def decode(
        self, layer: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, batch: DecodeBatch,
        out: Tensor, scale: float,
    ) -> None:  # fmt: skip
        """The decode rows of one layer, all of its launches; `out` [T, Hq, D]. Captured into graphs."""
        lists = self.select(layer, query, k_cache, index, batch, scale)
        self.attend(lists, query, k_cache, v_cache, batch, out, scale)

    def write_index(
        self, layer: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, batch: DecodeBatch,
        scale: float,
    ) -> None:  # fmt: skip
        """After the keys and values of prompt chunks are in the cache: records of the pages that they complete.

        Never captured; a method that keeps more (a state of the request) extends it. `batch` holds the prompt rows.
        """
        if index is not None and self.method.index != "none":
            update_index(k_cache, index, batch.slot_mapping, self.method.index)

    def warm_up(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, block_table: Tensor, scale: float
    ) -> None:
        """Launch what steps of any number of requests launch, on rows without keys, so that serving compiles nothing.

        Between steps, outside a capture, after `allocate`. The arguments are those of a step: their dtypes and strides
        count. Only the buffers that every step fills are written.
        """
        before, self.warm = self.stats.clone(), True
        d, width = self.dims, block_table.stride(0)
        for requests in request_counts(d.max_requests, d.num_kv_heads):
            for m in sorted({1, d.max_query_len}):
                tokens = requests * m
                q = torch.empty_strided(
                    (tokens, *query.shape[1:]), query.stride(), dtype=query.dtype, device=query.device
                ).zero_()
                out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
                ints = partial(torch.zeros, dtype=torch.int32, device=q.device)
                batch = DecodeBatch(
                    ints(requests, width)[:, : block_table.shape[1]], ints(requests), ints(requests + 1),
                    torch.full((tokens,), -1, dtype=torch.int64, device=q.device), ints(requests), tokens, m,
                )  # fmt: skip
                for layer in d.layers:
                    self.decode(layer, q, k_cache, v_cache, index, batch, out, scale)
        self.stats.copy_(before)

    # --------------------------------------------------------------------------------------------- references
    def reference_select(
        self, layer: int, row: Row, q: Tensor, k_cache: Tensor, index: Tensor | None, scale: float
    ) -> tuple[Tensor, Read]:
        """The list of a sparse request, q [m, Hq, D] -> ids [H, <= C] ascending int32, and what choosing read."""
        method, page, heads = self.method, k_cache.shape[2], k_cache.shape[1]
        s = reference.page_scores(q, k_cache, index, row.pages, row.n, scale, method.score, method.group, method.radius)
        ids = reference.select_pages(s, row.n, row.m, page, method.capacity, method.sink, method.local)
        scored = heads * row.pages.numel() if method.score != "recency" else 0
        return ids, Read(keys_listed(ids, row, page), scored, ids.numel())

    def reference_attend(
        self, layer: int, row: Row, q: Tensor, k_cache: Tensor, v_cache: Tensor, ids: Tensor | None, read: Read,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """Attention of one request over `ids`, None = every page: [m, Hq, D]; may add to `read`."""
        return reference.sparse_attention(q, k_cache, v_cache, row.pages, ids, row.n, scale)[0]

    def reference_decode(
        self, layer: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, batch: DecodeBatch,
        out: Tensor, scale: float,
    ) -> None:  # fmt: skip
        """`decode` in plain torch, request by request."""
        self.reference_index(layer, query, k_cache, v_cache, index, batch, scale)
        for row in self.rows(batch, k_cache.shape[2]):
            q, ids, read = query[row.tokens], None, None
            if not row.dense:
                ids, read = self.reference_select(layer, row, q, k_cache, index, scale)
            read_all = read or Read(k_cache.shape[1] * row.n)
            out[row.tokens] = self.reference_attend(layer, row, q, k_cache, v_cache, ids, read_all, scale)
            self.count(row.n, k_cache.shape[1], read)

    def reference_index(
        self, layer: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, index: Tensor | None, batch: DecodeBatch,
        scale: float,
    ) -> None:  # fmt: skip
        """`write_index` in plain torch; called for decode rows as well."""
        if index is not None and self.method.index != "none":
            reference.update_index(k_cache, index, batch.slot_mapping, self.method.index)

    def rows(self, batch: DecodeBatch, page: int) -> Iterator[Row]:
        """The requests of a batch on the host."""
        starts, flags = batch.query_start_loc.tolist(), batch.always_dense.tolist()
        for r, n in enumerate(batch.seq_lens.tolist()):
            if n and starts[r] < starts[r + 1]:
                pages = batch.block_table[r, : reference.page_count(n, page)].long()
                dense = n <= self.method.dense_limit or bool(flags[r])
                yield Row(r, slice(starts[r], starts[r + 1]), n, pages, dense)

    def count(self, n: int, heads: int, read: Read | None) -> None:
        """Add one request of `n` keys in one layer to `stats`; None = it was dense."""
        if read is None:
            values = [heads * n, heads * n, 0, 0, 0, heads, 0, 0]
        else:
            values = [
                read.keys_read, heads * n, read.pages_scored, read.pages_read, heads, 0, read.select_bytes,
                read.capped_rows,
            ]  # fmt: skip
        self.stats += torch.tensor(values, dtype=torch.int64, device=self.stats.device)


def keys_listed(ids: Tensor, row: Row, page: int) -> int:
    """Keys in the listed pages of all heads, ids [H, c]; the empty tail of the last page is no key."""
    return ids.numel() * page - ids.shape[0] * (row.pages.numel() * page - row.n)
