"""`moe tune --sonic`: what is searched, that the fastest tiles are found and written, the package's among them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ext.kernels.sonic_moe import Tile, Tiles
from vllm_ext.moe import sonic_table, sonic_tune
from vllm_ext.moe.shape import SHAPES, Shape
from vllm_ext.moe.sonic_candidates import candidates
from vllm_ext.records import device_name

SHAPE = SHAPES["qwen3-30b-a3b"]
LAYER = SimpleNamespace(shape=SHAPE, calls=lambda *_: [])
SHARED_MEMORY = 232448
"""Bytes of a block on sm_90."""


class NoPool:
    """Compiles nothing; remembers what it was asked for."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Any, ...]] = []

    def submit(self, _: Any, *args: Any) -> None:
        self.jobs.append(args)

    def wait(self) -> None: ...


def times(monkeypatch: pytest.MonkeyPatch, goal: Tiles) -> None:
    """Let the tiles of `goal` be the fastest, and its launches."""
    gemms = {"up": goal.up, "down": goal.down}
    monkeypatch.setattr(sonic_tune, "_plans", lambda *_: [])
    monkeypatch.setattr(sonic_tune, "_time", lambda _layer, _calls, _plans, which, t: 1.0 + (t != gemms[which]))
    monkeypatch.setattr(sonic_tune, "_call", lambda _layer, _calls, t: 3.0 - (t.pdl == goal.pdl) - (t == goal))


def test_the_fastest_tiles_and_launches_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    goal = Tiles(Tile(64, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4), pdl=True)
    times(monkeypatch, goal)
    pool = NoPool()
    assert sonic_tune.search(LAYER, 1024, pool) == (goal, 1.0)
    compiled = [tiles for _, _, tiles in pool.jobs]
    ups, downs = candidates(SHAPE, 1024)
    assert {t.up for t in compiled} == set(ups)
    assert {t.down for t in compiled} == set(downs)
    assert all(t.up.bm == t.down.bm for t in compiled)


def test_only_the_wide_search_reaches_the_rarer_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    goal = Tiles(Tile(128, 128, 128, 8, 2), Tile(128, 128, 128, 8, 3))
    times(monkeypatch, goal)
    assert sonic_tune.search(LAYER, 1024, NoPool(), wide=True)[0] == goal
    assert sonic_tune.search(LAYER, 1024, NoPool())[0].up != goal.up


@pytest.mark.parametrize("tokens", [1, 8, 64, 256, 1024, 4096, 16384])
@pytest.mark.parametrize("name", SHAPES)
def test_pipelines_fit_into_shared_memory(name: str, tokens: int) -> None:
    ups, downs = candidates(SHAPES[name], tokens, wide=True)
    for tiles, columns in ((ups, 2), (downs, 1)):
        assert len(set(tiles)) == len(tiles)
        assert all((t.bm + columns * t.bn) * t.bk * 2 * t.stages < SHARED_MEMORY for t in tiles)


def test_the_commands_can_make_the_tables_of_the_package() -> None:
    """Every tile that is shipped is one that the search tries for that number of tokens."""
    for file in sonic_table.FOLDER.glob("*.json"):
        shape = Shape(**json.loads(file.read_text())["shape"])
        for row in sonic_table.find(shape, file.name.split("device_name=")[1][:-5].replace("_", " ")).rows:
            ups, downs = candidates(shape, row.tokens)
            assert row.tiles.up in ups, (file.name, row)
            assert row.tiles.down in downs, (file.name, row)
            assert row.tiles in sonic_tune.variants(row.tiles)


def test_table_is_written_after_each_number_of_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiles = Tiles(Tile(64, 64, 64, 4, 3), Tile(64, 128, 64, 4, 3))
    asked = []

    def search(_layer: Any, tokens: int, _pool: Any, wide: bool) -> tuple[Tiles, float]:
        asked.append((tokens, wide))
        return replace(tiles, pdl=tokens > 100), 1e-6 * tokens

    monkeypatch.setattr(sonic_tune, "search", search)
    stock = [{"tokens": t, "time_s": 1e-4} for t in (64, 128)]
    done: list[int] = []
    path = sonic_tune.tune(LAYER, stock, NoPool(), tmp_path, lambda _, at, most: done.append(at), wide=True)
    table = sonic_table.find(SHAPE, device_name(), str(path))
    assert asked == [(64, True), (128, True)]
    assert [(r.tokens, r.tiles.pdl, r.serves) for r in table.rows] == [
        (64, False, True), (128, True, False),
    ]  # fmt: skip
    assert done == [1, 2]
    assert json.loads(path.read_text())["command"] == "moe tune --sonic --wide"
    before = path.read_text()
    stock[1]["time_s"] = 2e-4  # measured anew: no longer the same comparison
    sonic_tune.tune(LAYER, stock, NoPool(), tmp_path, lambda *_: None, wide=True)
    assert asked[2:] == [(128, True)]
    sonic_tune.tune(LAYER, stock, NoPool(), tmp_path, lambda *_: None)
    assert asked[3:] == [(64, False), (128, False)]  # another search
    path.write_text(before[:100])
    sonic_tune.tune(LAYER, stock[:1], NoPool(), tmp_path, lambda *_: None)
    assert asked[5:] == [(64, False)]


def test_wide_needs_sonic(assert_refused: Any) -> None:
    assert_refused(["moe", "tune", "olmoe-1b-7b", "--wide"], "--sonic")
