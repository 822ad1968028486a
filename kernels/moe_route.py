"""Counting sort of the routed pairs by expert, and the list of row tiles, in one launch or two, without atomics.

Specification: `reference_moe.route`. A pair is (token, slot): pair t * k + j routes token t to `ids[t, j]`. Chunks of
pairs are counted in a first launch and placed in a second; up to `ONE_CHUNK` pairs the second one counts for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE_CHUNK = 512
"""Up to this many pairs a single program sorts."""
CHUNKS = 128
"""Most chunks of a longer list, about one for each of the 132 SMs of an H100."""
TILE_RECORD = 4
"""Integers of a tile's record: expert, first tile of the expert, rows of the expert, first row of the expert."""


@triton.jit
def overlap_launches(PDL: tl.constexpr):
    """With PDL: wait for the launch before this one to end, then let the next one be set up."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def pdl_options(pdl: bool) -> dict[str, bool]:
    """Launch option of `overlap_launches`; left out where it is not wanted, since not every Triton knows it."""
    return {"launch_pdl": True} if pdl else {}


@triton.jit
def local_expert(ids, MAP, live, E: tl.constexpr, HAS_MAP: tl.constexpr):
    """Expert on this rank for each global id; E where the pair is skipped (id -1, or an expert of another rank)."""
    ids = ids.to(tl.int32)
    live = live & (ids >= 0)
    if HAS_MAP:
        ids = tl.load(MAP + ids, mask=live, other=-1).to(tl.int32)
        live = live & (ids >= 0)
    return tl.where(live, ids, E)


@triton.jit
def _histogram(e, E: tl.constexpr, EB: tl.constexpr):
    """Pairs of each expert; the skipped ones (expert E) are counted with expert 0 first, then taken off."""
    skipped = tl.sum((e == E).to(tl.int32), 0)
    return tl.histogram(tl.where(e == E, 0, e), EB) - tl.where(tl.arange(0, EB) == 0, skipped, 0)


@triton.jit(do_not_specialize=["pairs"])
def _count(
    IDS, MAP, HIST, pairs,
    E: tl.constexpr, EB: tl.constexpr, CHUNK: tl.constexpr, HAS_MAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """HIST[chunk] = pairs of each expert in a chunk."""
    chunk = tl.program_id(0)
    overlap_launches(PDL)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    e = local_expert(tl.load(IDS + at, mask=at < pairs, other=-1), MAP, at < pairs, E, HAS_MAP)
    tl.store(HIST + chunk * EB + tl.arange(0, EB), _histogram(e, E, EB))


@triton.jit(do_not_specialize=["pairs", "chunks", "tiles", "share"])
def _place(
    IDS, MAP, HIST, TOKEN, ROW, TILES, pairs, chunks, tiles, share,
    E: tl.constexpr, EB: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr, HB: tl.constexpr,
    TB: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, HAS_MAP: tl.constexpr, ALONE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """TOKEN[row], ROW[pair] of one chunk's pairs, and `share` records of TILES."""
    chunk = tl.program_id(0)
    overlap_launches(PDL)
    re = tl.arange(0, EB)
    before = tl.zeros([EB], tl.int32)
    if ALONE:
        every = tl.arange(0, CHUNK)
        chosen = local_expert(tl.load(IDS + every, mask=every < pairs, other=-1), MAP, every < pairs, E, HAS_MAP)
        total = _histogram(chosen, E, EB)
    else:
        total = tl.zeros([EB], tl.int32)
        rb = tl.arange(0, HB)
        for b in range(0, chunks, HB):
            h = tl.load(HIST + (b + rb)[:, None] * EB + re[None, :], mask=(b + rb < chunks)[:, None], other=0)
            total += tl.sum(h, 0)
            before += tl.sum(tl.where((b + rb < chunk)[:, None], h, 0), 0)
    first_row = tl.cumsum(total, 0) - total
    expert_tiles = (total + BM - 1) // BM
    end = tl.cumsum(expert_tiles, 0)

    rt = tl.arange(0, TB)
    for at in range(chunk * share, tl.minimum(chunk * share + share, tiles), TB):
        tile = at + rt
        mine = tile < tl.minimum(chunk * share + share, tiles)
        expert = tl.sum((end[None, :] <= tile[:, None]).to(tl.int32), 1)  # EB past the last tile
        here = re[None, :] == expert[:, None]
        record = TILES + tile * 4
        tl.store(record, tl.where(expert < E, expert, -1), mask=mine)
        tl.store(record + 1, tl.sum(tl.where(here, (end - expert_tiles)[None, :], 0), 1), mask=mine)
        tl.store(record + 2, tl.sum(tl.where(here, total[None, :], 0), 1), mask=mine)
        tl.store(record + 3, tl.sum(tl.where(here, first_row[None, :], 0), 1), mask=mine)
    if chunk == 0:
        tl.store(TILES + tiles * 4, tl.sum(expert_tiles, 0))

    base = first_row + before
    rs = tl.arange(0, SUB)
    for s in range(0, CHUNK, SUB):
        pair = chunk * CHUNK + s + rs
        e = local_expert(tl.load(IDS + pair, mask=pair < pairs, other=-1), MAP, pair < pairs, E, HAS_MAP)
        mark = e[:, None] == re[None, :]
        earlier = (e[:, None] == e[None, :]) & (rs[None, :] < rs[:, None])  # pairs with the same expert
        row = tl.sum(earlier.to(tl.int32), 1) + tl.sum(tl.where(mark, base[None, :], 0), 1)
        base += tl.sum(mark.to(tl.int32), 0)
        kept = e < E
        tl.store(TOKEN + row, pair // K, mask=kept)
        tl.store(ROW + pair, tl.where(kept, row, -1), mask=pair < pairs)


@dataclass
class Route:
    """Sorted pairs; P = T * k pairs, M tiles at most.

    Attributes:
        token: [P] int32, token of each row, rows in the order of experts; undefined behind the last row.
        row: [P] int32, row of each pair, -1 for a skipped one.
        tiles: [4 * M + 1] int32, a record of `TILE_RECORD` for each tile of `block_m` rows, the expert -1 behind the
            last tile; then the number of tiles.
        max_tiles: M, a bound that holds for any routing.
        block_m: rows of a tile.
    """

    token: Tensor
    row: Tensor
    tiles: Tensor
    max_tiles: int
    block_m: int


def max_tiles(pairs: int, experts: int, block_m: int) -> int:
    """Most tiles of `block_m` rows that `pairs` pairs can fill: a tile of one row for as many experts as possible."""
    hit = min(pairs, experts)
    return (pairs - hit) // block_m + hit


def route(ids: Tensor, experts: int, block_m: int, expert_map: Tensor | None = None, pdl: bool = False) -> Route:
    """Sort the pairs of `ids` by expert, stable.

    Args:
        ids: [T, k] integers, contiguous, expert of each pair in global numbers, -1 = skip the pair.
        experts: experts on this rank.
        block_m: rows of a tile.
        expert_map: [global experts] int32, expert on this rank or -1; None = the identity.
        pdl: programmatic dependent launch, see `overlap_launches`.

    Fixed launches and one allocation for given shapes, so the call can be captured.
    """
    tokens, k = ids.shape
    pairs = tokens * k
    alone = pairs <= ONE_CHUNK
    chunk = triton.next_power_of_2(max(pairs if alone else -(-pairs // CHUNKS), 128))
    chunks = -(-pairs // chunk)
    eb = max(2, triton.next_power_of_2(experts))
    tiles = max_tiles(pairs, experts, block_m)
    share = -(-tiles // chunks)
    hist = 0 if alone else chunks * eb
    sizes = [-(-size // 4) * 4 for size in (pairs, pairs, TILE_RECORD * tiles + 1, hist)]  # each 16-byte aligned
    pool = torch.empty(sum(sizes), dtype=torch.int32, device=ids.device)
    token, row, records, counts = pool.split(sizes)
    mapping, has_map = (ids, False) if expert_map is None else (expert_map, True)
    more = {"E": experts, "EB": eb, "CHUNK": chunk, "HAS_MAP": has_map, "PDL": pdl, **pdl_options(pdl)}
    if not alone:
        _count[(chunks,)](ids, mapping, counts, pairs, num_warps=4, **more)
    _place[(chunks,)](
        ids, mapping, counts, token, row, records, pairs, chunks, tiles, share,
        SUB=max(16, min(chunk, 64 if alone else 128, 16384 // eb)), HB=max(1, 4096 // eb), TB=16, K=k, BM=block_m,
        ALONE=alone, num_warps=8, **more,
    )  # fmt: skip
    return Route(token[:pairs], row[:pairs], records[: TILE_RECORD * tiles + 1], tiles, block_m)
