"""Moves tokens of one request for all layers in one launch: the survivors of an eviction, or a copy.

Specifications: `kv_reference.compact` and `kv_reference.resident`. Survivors move towards newer slots and keep their
order, so a program that works from the newest to the oldest never overwrites a survivor that it has not read: no
scratch memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 32


@triton.jit(do_not_specialize=["count", "first", "target", "k_layer", "k_head"])
def _compact(
    PTRS, CACHE, ROW, KEPT, count, first, target, c_page, c_head, c_tok, k_layer, k_head, P: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    head, layer = tl.program_id(0), tl.program_id(2)
    cache = tl.load(PTRS + layer).to(CACHE.dtype)
    kept = KEPT + layer.to(tl.int64) * k_layer + head * k_head
    rc = tl.program_id(1) * CP + tl.arange(0, CP)
    for done in range(0, count, TN):
        k = count - 1 - done - tl.arange(0, TN)
        ok = k >= 0
        source = first + tl.load(kept + k, mask=ok, other=0)
        slot = target + k
        from_page = tl.load(ROW + source // P, mask=ok, other=0).to(tl.int64)
        to_page = tl.load(ROW + slot // P, mask=ok, other=0).to(tl.int64)
        at = from_page * c_page + head * c_head + (source % P) * c_tok
        to = to_page * c_page + head * c_head + (slot % P) * c_tok
        mask = ok[:, None] & (rc < C)[None, :]
        x = tl.load(cache + at[:, None] + rc[None, :], mask=mask)
        tl.debug_barrier()  # every thread has read before one writes
        tl.store(cache + to[:, None] + rc[None, :], x, mask=mask)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["n", "first"])
def _gather(
    PTRS, CACHE, ROW, OUT, n, first, c_page, c_head, c_tok, P: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    TN: tl.constexpr,
):  # fmt: skip
    head, layer = tl.program_id(1), tl.program_id(2)
    cache = tl.load(PTRS + layer).to(CACHE.dtype)
    rc = tl.arange(0, CP)
    at = tl.program_id(0) * TN + tl.arange(0, TN)
    slot = first + at
    page = tl.load(ROW + slot // P, mask=at < n, other=0).to(tl.int64)
    mask = (at < n)[:, None] & (rc < C)[None, :]
    source = page * c_page + head * c_head + (slot % P) * c_tok
    x = tl.load(cache + source[:, None] + rc[None, :], mask=mask)
    row = (layer.to(tl.int64) * tl.num_programs(1) + head) * n + at
    tl.store(OUT + row[:, None] * C + rc[None, :], x, mask=mask)


class LayerCaches:
    """The caches of several layers with the same shape and strides, addressed in one launch.

    Args:
        caches: one view [num_blocks, H, P, C] a layer, last axis contiguous.
    """

    def __init__(self, caches: Sequence[Tensor]) -> None:
        self.like, self.caches = caches[0], caches
        if any(c.shape != self.like.shape or c.stride() != self.like.stride() for c in caches):
            raise ValueError("the caches of the layers differ in shape or strides")
        self.pointers = torch.tensor([c.data_ptr() for c in caches], dtype=torch.int64, device=self.like.device)

    def compact(self, row: Tensor, kept: Tensor, first: int, target: int) -> None:
        """`kv_reference.compact` in every layer; kept [L, H, k] int64 with a contiguous last axis."""
        channels = self.like.shape[3]
        width = min(128, max(16, triton.next_power_of_2(channels)))
        grid = (self.like.shape[1], triton.cdiv(channels, width), len(self.caches))
        _compact[grid](
            self.pointers, self.like, row, kept, kept.shape[2], first, target, *self.like.stride()[:3],
            *kept.stride()[:2], P=self.like.shape[2], C=channels, CP=width, TN=TILE, num_warps=4,
        )  # fmt: skip

    def gather(self, row: Tensor, first: int, end: int, layers: range | None = None) -> Tensor:
        """[L, H, end - first, C]: slots [first, end) of some layers, a copy."""
        layers = range(len(self.caches)) if layers is None else layers
        _, heads, page, channels = self.like.shape
        out = torch.empty(len(layers), heads, end - first, channels, dtype=self.like.dtype, device=self.like.device)
        _gather[(triton.cdiv(end - first, TILE), heads, len(layers))](
            self.pointers[layers.start :], self.like, row, out, end - first, first, *self.like.stride()[:3], P=page,
            C=channels, CP=triton.next_power_of_2(channels), TN=TILE, num_warps=4,
        )  # fmt: skip
        return out
