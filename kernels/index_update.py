"""K1: recompute the index record of every page that this step completes. Specification: `reference.update_index`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

KINDS = {"minmax": 0, "mean": 1}


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
@triton.jit(do_not_specialize_on_alignment=["SLOTS"])
def _update_index(
    K, INDEX, SLOTS, k_page, k_head, k_tok, i_page, i_head, KIND: tl.constexpr, P: tl.constexpr, D: tl.constexpr
):
    slot = tl.load(SLOTS + tl.program_id(0)).to(tl.int64)
    if slot >= 0 and slot % P == P - 1:
        page_record(K, INDEX, slot // P, tl.program_id(1), k_page, k_head, k_tok, i_page, i_head, KIND, P, D)


def update_index(k_cache: Tensor, index: Tensor, slot_mapping: Tensor, kind: str) -> None:
    """See `reference.update_index`; one program per token and KV head, most leave at once. No host sync."""
    tokens, heads = slot_mapping.shape[0], k_cache.shape[1]
    if not tokens:
        return
    _update_index[(tokens, heads)](
        k_cache,
        index,
        slot_mapping,
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        index.stride(0),
        index.stride(1),
        KIND=KINDS[kind],
        P=k_cache.shape[2],
        D=k_cache.shape[3],
        num_warps=4,
    )
