"""The per-step work of the eviction engine: block tables of the resident slots, and the queries that will score."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _shift(TABLE, STARTS, LENS, OUT, OUT_LENS, width, t_row, o_row, P: tl.constexpr, TN: tl.constexpr):
    r = tl.program_id(0)
    start = tl.load(STARTS + r)
    n = tl.maximum(tl.load(LENS + r) - start, 0)
    at = tl.program_id(1) * TN + tl.arange(0, TN)
    ok = (at * P < n) & (at + start // P < width)
    page = tl.load(TABLE + r.to(tl.int64) * t_row + start // P + at, mask=ok, other=0)
    tl.store(OUT + r.to(tl.int64) * o_row + at, page, mask=ok)
    if tl.program_id(1) == 0:
        tl.store(OUT_LENS + r, n)


def shift_tables(table: Tensor, starts: Tensor, lens: Tensor, out: Tensor, out_lens: Tensor, block: int) -> None:
    """Block tables and lengths from each row's first resident slot on; entries behind a row's length are not written.

    Args:
        table, out: [R, width] int32; starts, lens, out_lens: [R] int32; starts are multiples of `block`.
    """
    rows, width = table.shape
    if rows:
        _shift[(rows, triton.cdiv(width, 1024))](
            table, starts, lens, out, out_lens, width, table.stride(0), out.stride(0), P=block, TN=1024
        )


@triton.jit(do_not_specialize=["q_tok"])
def _record(QUERY, PLACES, RING, q_tok, width, TN: tl.constexpr):
    place = tl.load(PLACES + tl.program_id(0)).to(tl.int64)
    if place >= 0:
        at = tl.program_id(1) * TN + tl.arange(0, TN)
        ok = at < width
        x = tl.load(QUERY + tl.program_id(0).to(tl.int64) * q_tok + at, mask=ok)
        tl.store(RING + place * width + at, x, mask=ok)


def record_queries(query: Tensor, places: Tensor, ring: Tensor) -> None:
    """Copy the queries of the tokens that have a place; most have none and leave at once.

    Args:
        query: [T, Hq, D]; places: [T] int32, a row of the flattened ring or -1; ring: [slots, w, Hq, D].
    """
    width = query.shape[1] * query.shape[2]
    if places.shape[0]:
        _record[(places.shape[0], triton.cdiv(width, 1024))](query, places, ring, query.stride(0), width, TN=1024)


@triton.jit(do_not_specialize=["window", "layers", "width"])
def _window_queries(PTRS, RING, PLACES, OUT, window, layers, width, TN: tl.constexpr):
    request, layer = tl.program_id(1) // layers, tl.program_id(1) % layers
    ring = tl.load(PTRS + layer).to(RING.dtype)
    place = tl.load(PLACES + request * window + tl.program_id(0)).to(tl.int64)
    at = tl.program_id(2) * TN + tl.arange(0, TN)
    x = tl.load(ring + place * width + at, mask=at < width)
    row = tl.program_id(1).to(tl.int64) * window + tl.program_id(0)
    tl.store(OUT + row * width + at, x, mask=at < width)


def window_queries(pointers: Tensor, ring: Tensor, places: Tensor) -> Tensor:
    """Recorded queries of R requests in L layers, one launch: [R * L, w, Hq, D], by request, then by layer.

    Args:
        pointers: [L] int64 addresses of contiguous rings with the shape of `ring` [slots, window, Hq, D].
        places: [R, w] int32, rows of the flattened ring, oldest query first.
    """
    (requests, window), layers = places.shape, len(pointers)
    out = torch.empty(requests * layers, window, *ring.shape[2:], dtype=ring.dtype, device=ring.device)
    width = ring.shape[2] * ring.shape[3]
    _window_queries[(window, requests * layers, triton.cdiv(width, 1024))](
        pointers, ring, places, out, window, layers, width, TN=1024
    )
    return out
