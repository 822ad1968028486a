"""Search the tiles of the SonicMoE kernels for a layer, GEMM by GEMM, and write them beside vLLM's tuned times."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_ext import records
from vllm_ext.bench import moe
from vllm_ext.bench.compile_pool import CompilePool
from vllm_ext.kernels import moe_route, sonic_moe
from vllm_ext.kernels.sonic_moe import Tile, Tiles
from vllm_ext.moe.shape import Shape
from vllm_ext.moe.sonic_candidates import candidates
from vllm_ext.moe.sonic_table import file_name
from vllm_ext.moe.sonic_warmup import compile_call


def pairs(ups: list[Tile], downs: list[Tile]) -> list[Tiles]:
    """Every tile at least once, beside one of the other GEMM with as many rows: what a launch can compile."""
    found = []
    for bm in sorted({t.bm for t in ups}):
        up, down = [t for t in ups if t.bm == bm], [t for t in downs if t.bm == bm]
        found += [Tiles(up[i % len(up)], down[i % len(down)]) for i in range(max(len(up), len(down)))]
    return found


def search(layer: moe.Layer, tokens: int, pool: CompilePool, wide: bool = False) -> tuple[Tiles, float]:
    """(best tiles, seconds of a call): each GEMM's tiles apart, then the whole call with its launches arranged in turn.

    Args:
        wide: more tiles for each GEMM, more heights, and loads without the tensor memory accelerator.
    """
    shape = layer.shape
    calls = layer.calls(tokens, moe.routings(tokens))
    ups, downs = candidates(shape, tokens, wide)
    _compile(pool, shape, tokens, pairs(ups, downs))
    best: tuple[float, Tiles] | None = None
    for bm in sorted({t.bm for t in ups}):
        plans = _plans(layer, calls, bm)
        up_s, up = min(((_time(layer, calls, plans, "up", t), t) for t in ups if t.bm == bm), key=_seconds)
        down_s, down = min(((_time(layer, calls, plans, "down", t), t) for t in downs if t.bm == bm), key=_seconds)
        if best is None or up_s + down_s < best[0]:
            best = up_s + down_s, Tiles(up, down)
    assert best is not None
    found = variants(best[1])
    _compile(pool, shape, tokens, found)
    seconds, tiles = min(((_call(layer, calls, t), t) for t in found), key=_seconds)
    return tiles, seconds


def variants(tiles: Tiles) -> list[Tiles]:
    """The call with and without overlapped launches."""
    return [dataclasses.replace(tiles, pdl=pdl) for pdl in (False, True)]


def _compile(pool: CompilePool, shape: Shape, tokens: int, found: list[Tiles]) -> None:
    for tiles in found:
        pool.submit(compile_call, shape, tokens, tiles)
    pool.wait()


def _seconds(timed: tuple[float, Any]) -> float:
    return timed[0]


def _call(layer: moe.Layer, calls: list[Any], tiles: Tiles) -> float:
    """Seconds of a call."""
    return moe.measure(moe.sonic(layer, calls, tiles), len(calls))


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
    wide: bool = False,
) -> Path:
    """Write the table of tiles for the numbers of tokens in `stock`, the rows of `tune.tune`; returns its path.

    Rows of an earlier, equal run beside the same times of vLLM's are kept.
    """
    rows: list[dict[str, Any]] = []
    path = folder / file_name(layer.shape, records.device_name())
    command = "moe tune --sonic" + (" --wide" if wide else "")
    known = {(r["tokens"], r["stock_s"]): r for r in _previous(path, command)}
    for row in stock:
        found = known.get((row["tokens"], row["time_s"]))
        if found is None:
            tiles, seconds = search(layer, row["tokens"], pool, wide)
            found = {"tokens": row["tokens"], "tiles": tiles.as_dict(), "time_s": seconds, "stock_s": row["time_s"]}
        rows.append(found)
        records.save(records.record(command, rows, shape=dataclasses.asdict(layer.shape)), path)
        progress("sonic_moe's tiles", len(rows), len(stock))
    return path


def _previous(path: Path, command: str) -> list[dict[str, Any]]:
    """Rows of an earlier run of this command on this device with these versions; none if it was another."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    mine = (command, records.device_name(), records.versions())
    return record["results"] if mine == tuple(record.get(k) for k in ("command", "device", "versions")) else []
