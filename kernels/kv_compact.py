"""Moves tokens of several requests for all layers in one launch: the survivors of an eviction, or a copy.

Specifications: `kv_reference.compact` and `kv_reference.resident`. Survivors move towards newer slots and keep their
order, so a program that works from the newest to the oldest never overwrites a survivor that it has not read: no
scratch memory. Channels are independent: programs share a head between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 32
"""Tokens of a tile of a copy."""
MOVED = 128
"""Tokens of a tile of a compaction."""
LINE = 128
"""Bytes of a token that one program of a compaction moves: a cache line."""


@triton.jit
def _cache_of(PTRS, CACHE, layer, ALIGN: tl.constexpr):
    """Pointer of a layer's cache; its address is a multiple of `ALIGN` bytes."""
    return tl.multiple_of(tl.load(PTRS + layer).to(CACHE.dtype), ALIGN)


@triton.jit(do_not_specialize=["count", "target", "layers", "r_row", "k_request", "k_layer", "k_head"])
def _compact(
    PTRS, CACHE, ROWS, KEPT, count, target, layers, r_row, k_request, k_layer, k_head, c_page, c_head, c_tok,
    P: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, TN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    head, request, layer = tl.program_id(0), tl.program_id(2) // layers, tl.program_id(2) % layers
    cache = _cache_of(PTRS, CACHE, layer, ALIGN)
    row = ROWS + request.to(tl.int64) * r_row
    kept = KEPT + request.to(tl.int64) * k_request + layer.to(tl.int64) * k_layer + head * k_head
    rc = tl.program_id(1) * CP + tl.arange(0, CP)
    for done in range(0, count, TN):
        k = count - 1 - done - tl.arange(0, TN)
        source = tl.load(kept + k, mask=k >= 0, other=0)
        slot = target + k
        ok = (k >= 0) & (source != slot)
        from_page = tl.load(row + source // P, mask=ok, other=0).to(tl.int64)
        to_page = tl.load(row + slot // P, mask=ok, other=0).to(tl.int64)
        at = from_page * c_page + head * c_head + (source % P) * c_tok
        to = to_page * c_page + head * c_head + (slot % P) * c_tok
        mask = ok[:, None] & (rc < C)[None, :]
        x = tl.load(cache + at[:, None] + rc[None, :], mask=mask)
        tl.debug_barrier()  # every thread has read before one writes
        tl.store(cache + to[:, None] + rc[None, :], x, mask=mask)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["n", "first", "layers", "r_row"])
def _gather(
    PTRS, CACHE, ROWS, OUT, n, first, layers, r_row, c_page, c_head, c_tok, P: tl.constexpr, C: tl.constexpr,
    CP: tl.constexpr, TN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    head, request, layer = tl.program_id(1), tl.program_id(2) // layers, tl.program_id(2) % layers
    cache = _cache_of(PTRS, CACHE, layer, ALIGN)
    rc = tl.arange(0, CP)
    at = tl.program_id(0) * TN + tl.arange(0, TN)
    slot = first + at
    page = tl.load(ROWS + request.to(tl.int64) * r_row + slot // P, mask=at < n, other=0).to(tl.int64)
    mask = (at < n)[:, None] & (rc < C)[None, :]
    source = page * c_page + head * c_head + (slot % P) * c_tok
    x = tl.load(cache + source[:, None] + rc[None, :], mask=mask)
    row = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + head) * n + at
    tl.store(OUT + row[:, None] * C + rc[None, :], x, mask=mask)


class LayerCaches:
    """The caches of several layers with the same shape and strides, addressed in one launch.

    R requests have block tables `rows` [R, blocks] int32 that begin with their first resident block: slot 0 is a
    request's oldest resident token. Results go by request, then by layer.

    Args:
        caches: one view [num_blocks, H, P, C] a layer, last axis contiguous.
    """

    def __init__(self, caches: Sequence[Tensor]) -> None:
        self.like, self.caches = caches[0], caches
        if any(c.shape != self.like.shape or c.stride() != self.like.stride() for c in caches):
            raise ValueError("the caches of the layers differ in shape or strides")
        addresses = [c.data_ptr() for c in caches]
        self.pointers = torch.tensor(addresses, dtype=torch.int64, device=self.like.device)
        self.align = 16 if all(a % 16 == 0 for a in addresses) else self.like.element_size()

    def pointers_of(self, layers: range | None) -> Tensor:
        """[L] int64 addresses of some layers, default all."""
        return self.pointers if layers is None else self.pointers[layers.start : layers.stop]

    def compact(self, rows: Tensor, kept: Tensor, target: int) -> None:
        """`kv_reference.compact` in every layer; kept [R, L, H, k] int64 with a contiguous last axis."""
        channels = self.like.shape[3]
        width = min(LINE // self.like.element_size(), triton.next_power_of_2(channels))
        layers = len(self.caches)
        _compact[(self.like.shape[1], triton.cdiv(channels, width), layers * rows.shape[0])](
            self.pointers, self.like, rows, kept, kept.shape[3], target, layers, rows.stride(0), *kept.stride()[:3],
            *self.like.stride()[:3], P=self.like.shape[2], C=channels, CP=width, TN=MOVED, ALIGN=self.align,
            num_warps=4,
        )  # fmt: skip

    def gather(self, rows: Tensor, first: int, end: int, layers: range | None = None) -> Tensor:
        """[R * L, H, end - first, C]: slots [first, end) of some layers, a copy."""
        pointers = self.pointers_of(layers)
        entries, (_, heads, page, channels) = len(pointers) * rows.shape[0], self.like.shape
        out = torch.empty(entries, heads, end - first, channels, dtype=self.like.dtype, device=self.like.device)
        if first < end:
            _gather[(triton.cdiv(end - first, TILE), heads, entries)](
                pointers, self.like, rows, out, end - first, first, len(pointers), rows.stride(0),
                *self.like.stride()[:3], P=page, C=channels, CP=triton.next_power_of_2(channels), TN=TILE,
                ALIGN=self.align, num_warps=4,
            )  # fmt: skip
        return out
