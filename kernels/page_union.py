"""One page list for all query tokens of a request: each token chooses alone, every token reads what any of them chose.

Specification: `reference_union`. `expand` turns a batch of requests with several query tokens into one of requests
with a single token each, for `score_select`; `page_union` joins the lists of a request's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ext.kernels.score_select import _count


def reference_union(lists: list[Tensor]) -> Tensor:
    """Union over the tokens of a request: ascending ids [H, c_t] int32 each -> [H, c] int32, ascending, -1 behind.

    The union of a KV head's lists has its own length; shorter ones end with -1.
    """
    heads = lists[0].shape[0]
    rows = [torch.cat([ids[h] for ids in lists]).unique() for h in range(heads)]
    out = torch.full((heads, max(len(row) for row in rows)), -1, dtype=torch.int32, device=lists[0].device)
    for h, row in enumerate(rows):
        out[h, : len(row)] = row
    return out


@triton.jit
def _expand(
    BT, SEQ, START, DENSE, TABLE, LENS, FLAGS, requests, dense_limit, pages, bt_row, t_row, P: tl.constexpr,
    RB: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    r = tl.arange(0, RB)
    ends = tl.load(START + 1 + r, mask=r < requests, other=0x7FFFFFFF)
    mine = tl.sum((ends <= t).to(tl.int32), 0)
    if mine >= requests:  # a padded token
        tl.store(LENS + t, 0)
        return
    n = tl.load(SEQ + mine)
    after = tl.load(START + mine + 1) - 1 - t
    tl.store(LENS + t, tl.maximum(n - after, 0))
    tl.store(FLAGS + t, ((n <= dense_limit) | (tl.load(DENSE + mine) != 0)).to(tl.int32))
    for first in range(0, tl.cdiv(n, P), NB):
        page = first + tl.arange(0, NB)
        ok = page < pages
        row = tl.load(BT + mine.to(tl.int64) * bt_row + page, mask=ok, other=0)
        tl.store(TABLE + t.to(tl.int64) * t_row + page, row, mask=ok)


@triton.jit
def _page_union(
    IDS, COUNTS, BT, SEQ, START, SLOTS, OUT_IDS, OUT_PAGES, OUT_COUNTS, MARKS, STATS, capacity, out_capacity, np_cap,
    bt_row, H: tl.constexpr, P: tl.constexpr, NB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    r = pair // H
    head = pair % H
    n = tl.load(SEQ + r)
    q0 = tl.load(START + r)
    m = tl.load(START + r + 1) - q0
    if n == 0 or m == 0:
        return
    real = tl.load(SLOTS + q0) >= 0
    if tl.load(COUNTS + q0 * H + head) < 0:  # all tokens of a request are dense, or none is
        tl.store(OUT_COUNTS + pair, -1)
        if real:
            _count(STATS, n, n, n, n, False)
        return
    count = tl.cdiv(n, P)
    page = tl.arange(0, NB)
    mark = MARKS + pair.to(tl.int64) * np_cap
    tl.store(mark + page, 0, mask=page < count)
    tl.debug_barrier()
    slot = tl.arange(0, CB)
    for t in range(0, m):
        row = (q0 + t) * H + head
        used = tl.load(COUNTS + row)
        ids = tl.load(IDS + row.to(tl.int64) * capacity + slot, mask=slot < used, other=0)
        tl.store(mark + ids, 1, mask=slot < used)
    tl.debug_barrier()
    chosen = tl.load(mark + page, mask=page < count, other=0) != 0
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    total = tl.sum(chosen.to(tl.int32), 0)
    at = pair.to(tl.int64) * out_capacity
    tl.store(OUT_IDS + at + place, page, mask=chosen)
    tl.store(OUT_PAGES + at + place, tl.load(BT + r.to(tl.int64) * bt_row + page, mask=chosen, other=0), mask=chosen)
    tl.store(OUT_IDS + at + page, -1, mask=(page >= total) & (page < out_capacity))
    tl.store(OUT_COUNTS + pair, total)
    if real:
        _count(STATS, total * P - (count * P - n), n, count * m, total, True)


@dataclass
class UnionBuffers:
    """Scratch and results of `expand` and `page_union`, allocated once per engine."""

    table: Tensor
    lens: Tensor
    flags: Tensor
    start: Tensor
    marks: Tensor
    ids: Tensor
    pages: Tensor
    counts: Tensor

    @classmethod
    def allocate(
        cls, requests: int, tokens: int, heads: int, pages: int, capacity: int, device: torch.device | str
    ) -> UnionBuffers:
        """Room for `requests` requests with `tokens` query tokens in all; `capacity`: longest union, in pages."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            zeros(tokens, pages),
            zeros(tokens),
            zeros(tokens),
            torch.arange(tokens + 1, dtype=torch.int32, device=device),
            zeros(requests, heads, pages),
            zeros(requests, heads, capacity),
            zeros(requests, heads, capacity),
            zeros(requests, heads),
        )


def expand(
    block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor, always_dense: Tensor, tokens: int,
    buffers: UnionBuffers, *, dense_limit: int, page: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """A batch of one-token requests: (block table [T, pages], lengths [T], starts [T + 1], dense flags [T]).

    Token t of a request with n keys and m query tokens sees n - m + 1 + t keys; a padded token has length 0. A request
    of up to `dense_limit` keys is dense in all of its tokens.
    """
    requests, pages = seq_lens.shape[0], buffers.table.shape[1]
    _expand[(tokens,)](
        block_table, seq_lens, query_start_loc, always_dense, buffers.table, buffers.lens, buffers.flags,
        requests, dense_limit, min(pages, block_table.shape[1]), block_table.stride(0), pages,
        P=page, RB=triton.next_power_of_2(requests), NB=min(1024, triton.next_power_of_2(pages)),
    )  # fmt: skip
    return buffers.table[:tokens], buffers.lens[:tokens], buffers.start[: tokens + 1], buffers.flags[:tokens]


def page_union(
    ids: Tensor, counts: Tensor, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor, slot_mapping: Tensor,
    buffers: UnionBuffers, stats: Tensor, page: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Join the lists of tokens, ids [T, H, C] and counts [T, H], into one a request: ids, pages [R, H, C'], counts."""
    requests, heads, capacity = seq_lens.shape[0], counts.shape[1], ids.shape[2]
    np_cap, out_capacity = buffers.marks.shape[2], buffers.ids.shape[2]
    _page_union[(requests * heads,)](
        ids, counts, block_table, seq_lens, query_start_loc, slot_mapping, buffers.ids, buffers.pages, buffers.counts,
        buffers.marks, stats, capacity, out_capacity, np_cap, block_table.stride(0),
        H=heads, P=page, NB=triton.next_power_of_2(max(np_cap, out_capacity)), CB=triton.next_power_of_2(capacity),
    )  # fmt: skip
    return buffers.ids[:requests], buffers.pages[:requests], buffers.counts[:requests]
