"""Counting sort of the routed pairs by expert, and the list of row tiles, in one launch or two, without atomics.

Specification: `reference_moe.route`. A pair is (token, slot): pair t * k + j routes token t to `ids[t, j]`. Chunks of
pairs are counted in a first launch and placed in a second; up to `ONE_CHUNK` pairs the second one counts for itself.
The sort leaves the memory idle, so that programs beside it can bring the weights that are read first into the L2 cache.
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
PREFETCHERS = 64
"""Programs that bring weights into the L2 cache while the others sort."""


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
def prefetch_l2(W, part, MIB: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr):
    """Ask for one of `PARTS` parts of the first `MIB` MiB of W, 4 KiB a thread at a time; nothing waits for them."""
    WIDTH: tl.constexpr = WARPS * 32
    first = W.to(tl.int64, bitcast=True)
    for at in range(0, MIB * 256 // PARTS, WIDTH):
        piece = at + tl.arange(0, WIDTH)
        address = first + (part * (MIB * 256 // PARTS) + piece).to(tl.int64) * 4096
        tl.inline_asm_elementwise(
            """{ .reg .pred p;
            setp.ne.s32 p, $2, 0;
            @p cp.async.bulk.prefetch.L2.global [$1], 4096;
            mov.u32 $0, 0; }""",
            "=r,l,r",
            [address, (piece < MIB * 256 // PARTS).to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


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


@triton.jit(do_not_specialize=["pairs", "chunks"])
def _count(
    IDS, MAP, HIST, W, pairs, chunks,
    E: tl.constexpr, EB: tl.constexpr, CHUNK: tl.constexpr, HAS_MAP: tl.constexpr, PDL: tl.constexpr,
    MIB: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """HIST[chunk] = pairs of each expert in a chunk; the programs behind the last chunk bring weights closer."""
    chunk = tl.program_id(0)
    if MIB > 0:  # noqa: SIM102  decided while compiling
        if chunk >= chunks:
            prefetch_l2(W, chunk - chunks, MIB, PARTS, WARPS)
            return
    overlap_launches(PDL)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    e = local_expert(tl.load(IDS + at, mask=at < pairs, other=-1), MAP, at < pairs, E, HAS_MAP)
    tl.store(HIST + chunk * EB + tl.arange(0, EB), _histogram(e, E, EB))


@triton.jit(do_not_specialize=["pairs", "chunks", "tiles", "share"])
def _place(
    IDS, MAP, HIST, TOKEN, ROW, TILES, W, pairs, chunks, tiles, share,
    E: tl.constexpr, EB: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr, HB: tl.constexpr,
    TB: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, HAS_MAP: tl.constexpr, ALONE: tl.constexpr,
    PDL: tl.constexpr, MIB: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """TOKEN[row], ROW[pair] of one chunk's pairs, and `share` records of TILES; else see `_count`."""
    chunk = tl.program_id(0)
    if MIB > 0:  # noqa: SIM102  decided while compiling
        if chunk >= chunks:
            prefetch_l2(W, chunk - chunks, MIB, PARTS, WARPS)
            return
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


def route(
    ids: Tensor,
    experts: int,
    block_m: int,
    expert_map: Tensor | None = None,
    pdl: bool = False,
    weights: Tensor | None = None,
    prefetch: int = 0,
) -> Route:
    """Sort the pairs of `ids` by expert, stable.

    Args:
        ids: [T, k] integers, contiguous, expert of each pair in global numbers, -1 = skip the pair.
        experts: experts on this rank.
        block_m: rows of a tile.
        expert_map: [global experts] int32, expert on this rank or -1; None = the identity.
        pdl: programmatic dependent launch, see `overlap_launches`.
        weights, prefetch: bring the first `prefetch` MiB of `weights` into the L2 cache meanwhile; GPUs only.

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
    mib = 0
    if weights is not None and weights.device.type != "cpu":
        mib = min(prefetch, weights.numel() * weights.element_size() >> 20)
    w, helpers = (weights, PREFETCHERS) if mib else (ids, 0)
    more = {"E": experts, "EB": eb, "CHUNK": chunk, "HAS_MAP": has_map, "PDL": pdl, "PARTS": PREFETCHERS}
    more |= pdl_options(pdl)
    if not alone:
        _count[(chunks + helpers,)](
            ids, mapping, counts, w, pairs, chunks, MIB=mib, WARPS=4, num_warps=4, **more
        )  # fmt: skip
    _place[(chunks + (helpers if alone else 0),)](
        ids, mapping, counts, token, row, records, w, pairs, chunks, tiles, share,
        SUB=max(16, min(chunk, 64 if alone else 128, 16384 // eb)), HB=max(1, 4096 // eb), TB=16, K=k, BM=block_m,
        ALONE=alone, MIB=mib if alone else 0, WARPS=8, num_warps=8, **more,
    )  # fmt: skip
    return Route(token[:pairs], row[:pairs], records[: TILE_RECORD * tiles + 1], tiles, block_m)
