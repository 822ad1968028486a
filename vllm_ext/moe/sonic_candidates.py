"""Tiles of the SonicMoE kernels worth trying for a layer, by the number of rows that an expert has on average."""

from __future__ import annotations

from dataclasses import replace

from vllm_ext.kernels.sonic_moe import Tile
from vllm_ext.moe.shape import Shape

# rows of a tile -> (columns of the gate's tile, depth, warps, stages, programs); the down projection's has twice the
# columns, so that both have the same accumulators
SHARED: dict[int, tuple[tuple[int, int, int, int, int], ...]] = {
    16: (
        (32, 128, 4, 4, 0), (32, 256, 4, 3, 0), (64, 128, 4, 3, 0), (64, 64, 4, 4, 0), (32, 64, 4, 6, 0),
        (64, 128, 8, 4, 0), (128, 64, 4, 4, 0), (128, 128, 8, 3, 0),
    ),
    32: ((32, 128, 4, 4, 0), (64, 128, 4, 3, 0), (64, 64, 4, 4, 0), (128, 64, 4, 3, 0), (64, 128, 8, 4, 0)),
    64: (
        (64, 64, 4, 4, 0), (64, 64, 4, 3, 0), (128, 64, 4, 3, 0), (128, 64, 8, 4, 0), (64, 64, 8, 4, 0),
        (128, 64, 8, 5, 0), (128, 128, 8, 2, 0),
    ),
    128: (
        (64, 64, 4, 3, 0), (64, 64, 8, 3, 0), (128, 64, 8, 3, 0), (128, 64, 8, 4, 0), (64, 64, 4, 3, 264),
        (128, 64, 8, 3, 132), (128, 64, 8, 4, 132), (64, 64, 8, 4, 132),
    ),
}  # fmt: skip
# the wide search adds these, for one GEMM each
UP: dict[int, tuple[tuple[int, int, int, int, int], ...]] = {
    16: ((32, 128, 4, 6, 0), (64, 256, 8, 2, 0)),
    32: ((32, 256, 4, 3, 0), (64, 64, 4, 6, 0), (128, 64, 8, 5, 0), (128, 128, 8, 2, 0)),
    64: ((64, 128, 4, 2, 0), (64, 128, 4, 4, 0), (128, 64, 4, 2, 0), (128, 64, 8, 4, 132), (128, 64, 4, 4, 0)),
    128: ((128, 128, 8, 2, 0), (64, 128, 8, 3, 0), (64, 64, 8, 6, 0)),
}  # fmt: skip
DOWN: dict[int, tuple[tuple[int, int, int, int, int], ...]] = {
    16: ((64, 128, 4, 6, 0), (64, 256, 4, 4, 0), (128, 256, 8, 2, 0)),
    32: ((64, 256, 4, 3, 0), (128, 64, 4, 6, 0), (128, 64, 8, 4, 0)),
    64: ((128, 128, 4, 2, 0), (128, 128, 4, 4, 0), (128, 64, 4, 4, 264), (128, 64, 4, 3, 396), (256, 64, 4, 2, 0)),
    128: ((128, 64, 4, 2, 0), (128, 128, 8, 3, 0), (128, 64, 8, 6, 0)),
}  # fmt: skip
TAILS = (32, 64)
"""Rows of the smaller tile for the last rows of an expert, beside tiles of 128 rows of the up projection."""
GROUPS = (4, 16, 32)
"""Row tiles that run together, beside the usual 8, where experts have many."""


def heights(rows: float, wide: bool = False) -> tuple[int, ...]:
    """Rows of a tile worth trying for a mean number of rows of an expert."""
    for most, found in ((2, (16,)), (8, (16, 32)), (24, (16, 32, 64)), (64, (32, 64, 128))):
        if rows <= most:
            return tuple(sorted({*found, min(128, 2 * found[-1])})) if wide else found
    return (64, 128)


def candidates(shape: Shape, tokens: int, wide: bool = False) -> tuple[list[Tile], list[Tile]]:
    """(tiles of the up projection, tiles of the down projection)."""
    rows = tokens * shape.k / shape.experts
    ups: list[Tile] = []
    downs: list[Tile] = []
    for bm in heights(rows, wide):
        ups += [_tile(bm, *fields) for fields in SHARED[bm]]
        downs += [_tile(bm, 2 * n, *rest) for n, *rest in SHARED[bm]]
        if wide:
            ups += [_tile(bm, *fields) for fields in UP[bm]]
            downs += [_tile(bm, *fields) for fields in DOWN[bm]]
    pointers = [replace(t, tma=False) for t in ups if not t.programs] if wide else []
    tails = [replace(t, tail=tail) for t in ups for tail in TAILS if t.bm == 128 and not t.programs]
    if rows >= 1024:
        for found, columns in ((ups, 128), (downs, 256)):
            found += [
                replace(t, group=group)
                for t in found
                for group in GROUPS
                if (t.bm, t.bn) == (128, columns) and not t.programs
            ]
    return ups + tails + pointers, downs


def _tile(bm: int, n: int, k: int, warps: int, stages: int, programs: int) -> Tile:
    return Tile(bm, n, k, warps, stages, programs=programs)
