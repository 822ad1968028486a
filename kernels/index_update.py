"""K1: recompute the index record of every page that this step completes. Specification: `reference.update_index`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

KINDS = {"minmax": 0, "mean": 1}
ROWS = 128
"""Tokens whose slots one program looks at."""


@triton.jit
def page_record(
    K, INDEX, page, head, k_page, k_head, k_tok, i_page, i_head, KIND: tl.constexpr, P: tl.constexpr, D: tl.constexpr
):
    """Write the record of one full page and KV head, 64 channels at a time (few registers, any head size)."""
    rp = tl.arange(0, P)
    rc = tl.arange(0, 64)
    src = K + page * k_page + head * k_head
    dst = INDEX + page * i_page + head * i_head
    for c in tl.static_range(0, D, 64):
        rd = c + rc
        ok = rd < D
        keys = tl.load(src + rp[:, None] * k_tok + rd[None, :], mask=ok[None, :], other=0.0)
        if KIND == 0:
            tl.store(dst + rd, tl.min(keys.to(tl.float32), 0).to(INDEX.dtype.element_ty), mask=ok)
            tl.store(dst + D + rd, tl.max(keys.to(tl.float32), 0).to(INDEX.dtype.element_ty), mask=ok)
        else:
            mean = tl.sum(keys.to(tl.float32), 0) / P
            tl.store(dst + rd, mean.to(INDEX.dtype.element_ty), mask=ok)


# Slots of prompt rows start anywhere in the step's slots.
@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["SLOTS"])
def _update_index(
    K, INDEX, SLOTS, tokens, k_page, k_head, k_tok, i_page, i_head, KIND: tl.constexpr, P: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(SLOTS + row, mask=row < tokens, other=-1).to(tl.int64)
    ends = (slot >= 0) & (slot % P == P - 1)
    place = tl.cumsum(ends.to(tl.int32), 0)
    for i in range(1, tl.sum(ends.to(tl.int32), 0) + 1):
        page = tl.sum(tl.where(ends & (place == i), slot // P, 0), 0)
        page_record(K, INDEX, page, tl.program_id(1), k_page, k_head, k_tok, i_page, i_head, KIND, P, D)


def update_index(k_cache: Tensor, index: Tensor, slot_mapping: Tensor, kind: str, rows: int | None = None) -> None:
    """See `reference.update_index`; one program per KV head and `rows` tokens (None = `ROWS`). No host sync.

    A program finds the pages that its tokens complete, whatever requests they belong to, and writes their records.
    """
    tokens, heads, rows = slot_mapping.shape[0], k_cache.shape[1], rows or ROWS
    if not tokens:
        return
    _update_index[(triton.cdiv(tokens, rows), heads)](
        k_cache, index, slot_mapping, tokens, k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        index.stride(0), index.stride(1), KIND=KINDS[kind], P=k_cache.shape[2], D=k_cache.shape[3], ROWS=rows,
        num_warps=4,
    )  # fmt: skip
