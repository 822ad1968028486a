"""Search the tiles of the SonicMoE kernels for a layer, GEMM by GEMM, and write them beside vLLM's tuned times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_ext import records
from vllm_ext.bench import moe
from vllm_ext.bench.compile_pool import CompilePool
from vllm_ext.kernels import moe_route, sonic_moe
from vllm_ext.kernels.sonic_moe import Tile, Tiles
from vllm_ext.moe.shape import Shape
from vllm_ext.moe.sonic_table import file_name
from vllm_ext.moe.sonic_warmup import compile_call

# rows of a tile -> (columns of the gate's tile, depth, warps, stages, programs); the down projection's has twice the
# columns, so that both have the same accumulators
CANDIDATES: dict[int, tuple[tuple[int, int, int, int, int], ...]] = {
    16: (
        (32, 128, 4, 4, 0), (32, 256, 4, 3, 0), (64, 128, 4, 3, 0), (64, 64, 4, 4, 0), (32, 64, 4, 6, 0),
        (64, 128, 8, 4, 0), (128, 64, 4, 4, 0), (128, 128, 8, 3, 0),
    ),
    32: ((32, 128, 4, 4, 0), (64, 128, 4, 3, 0), (64, 64, 4, 4, 0), (128, 64, 4, 3, 0), (64, 128, 8, 4, 0)),
    64: ((64, 64, 4, 4, 0), (64, 64, 4, 3, 0), (128, 64, 4, 3, 0), (128, 64, 8, 4, 0), (64, 64, 8, 4, 0)),
    128: (
        (64, 64, 4, 3, 0), (64, 64, 8, 3, 0), (128, 64, 8, 3, 0), (128, 64, 8, 4, 0), (64, 64, 4, 3, 264),
        (128, 64, 8, 3, 132), (64, 64, 8, 4, 132),
    ),
}  # fmt: skip


def heights(rows: float) -> tuple[int, ...]:
    """Rows of a tile worth trying for a mean number of rows of an expert."""
    for most, found in ((2, (16,)), (8, (16, 32)), (24, (16, 32, 64)), (64, (32, 64, 128))):
        if rows <= most:
            return found
    return (64, 128)


def candidates(shape: Shape, tokens: int) -> list[Tiles]:
    """Pairs of tiles to compile; each GEMM's are timed apart."""
    rows = tokens * shape.k / shape.experts
    found = []
    for bm in heights(rows):
        for n, k, warps, stages, programs in CANDIDATES[bm]:
            tile = Tile(bm, n, k, warps, stages, programs=programs)
            found.append(Tiles(tile, dataclasses.replace(tile, bn=2 * n)))
    if rows >= 1024:
        found += [
            Tiles(dataclasses.replace(t.up, group=group), dataclasses.replace(t.down, group=group))
            for t in found
            for group in (4, 16, 32)
            if t.up.bm == 128 and t.up.bn == 128 and not t.up.programs
        ]
    return found


def search(layer: moe.Layer, tokens: int, pool: CompilePool) -> tuple[Tiles, float]:
    """(best tiles, seconds of a call)."""
    shape = layer.shape
    calls = layer.calls(tokens, moe.routings(tokens))
    found = candidates(shape, tokens)
    for tiles in found:
        pool.submit(compile_call, shape, tokens, tiles)
    pool.wait()
    best: tuple[float, Tiles] | None = None
    for bm in heights(tokens * shape.k / shape.experts):
        plans = _plans(layer, calls, bm)
        ups = {t.up: _time(layer, calls, plans, "up", t.up) for t in found if t.up.bm == bm}
        downs = {t.down: _time(layer, calls, plans, "down", t.down) for t in found if t.down.bm == bm}
        up, down = min(ups, key=ups.__getitem__), min(downs, key=downs.__getitem__)
        if best is None or ups[up] + downs[down] < best[0]:
            best = ups[up] + downs[down], Tiles(up, down)
    assert best is not None
    overlapped = dataclasses.replace(best[1], pdl=True)
    times = {t: moe.measure(moe.sonic(layer, calls, t), len(calls)) for t in (best[1], overlapped)}
    return min(times.items(), key=lambda item: item[1])


def _plans(layer: moe.Layer, calls: list[Any], bm: int) -> list[moe_route.Route]:
    tile = Tile(bm, 64, 64, 4, 3)
    pairs = calls[0][2].numel()
    if sonic_moe.unsorted(pairs, layer.shape.experts):
        return [sonic_moe._each_its_own(ids, pairs, Tiles(tile, tile)) for _, _, ids in calls]
    return [moe_route.route(ids, layer.shape.experts, bm) for _, _, ids in calls]


def _time(layer: moe.Layer, calls: list[Any], plans: list[moe_route.Route], which: str, tile: Tile) -> float:
    """Seconds of one GEMM; infinite if the device cannot run the tile."""
    import torch
    from triton.runtime.errors import OutOfResources

    shape = layer.shape
    pairs = calls[0][2].numel()
    y1, y2 = torch.randn(pairs, shape.n, device="cuda").to(layer.w2.dtype), layer.w2.new_empty(pairs, shape.d)
    flags = {"NAIVE": sonic_moe.unsorted(pairs, shape.experts), "HAS_MAP": False, "PDL": False}

    def walk() -> None:
        for (x, _, ids), plan in zip(calls, plans):
            if which == "up":
                sonic_moe.up(x, layer.w13, y1, plan, ids, ids, shape.k, tile, flags)
            else:
                sonic_moe.down(y1, layer.w2, y2, plan, ids, ids, tile, flags)

    try:
        return moe.measure(walk, len(calls), 0.02)
    except OutOfResources:
        return float("inf")


def tune(
    layer: moe.Layer,
    stock: list[dict[str, Any]],
    pool: CompilePool,
    folder: Path,
    progress: Callable[[str, int, int], None],
) -> Path:
    """Write the table of tiles for the numbers of tokens in `stock`, the rows of `tune.tune`; returns its path."""
    rows: list[dict[str, Any]] = []
    path = folder / file_name(layer.shape, records.device_name())
    for row in stock:
        tiles, seconds = search(layer, row["tokens"], pool)
        rows.append({"tokens": row["tokens"], "tiles": tiles.as_dict(), "time_s": seconds, "stock_s": row["time_s"]})
        records.save(records.record("moe tune --sonic", rows, shape=dataclasses.asdict(layer.shape)), path)
        progress("sonic_moe's tiles", len(rows), len(stock))
    return path
