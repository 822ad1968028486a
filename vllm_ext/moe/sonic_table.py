"""Measured tiles of the SonicMoE kernels: one file for a layer shape and GPU, made by `vllm-ext moe tune`.

A row holds, for a number of tokens, the tiles of both GEMMs, their time, and the time of vLLM's kernels with tuned
tiles. Calls between two rows are served if both are: no call runs slower than what was measured beside it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ext.moe.shape import Shape
from vllm_ext.options import ConfigError

if TYPE_CHECKING:
    from vllm_ext.kernels.sonic_moe import Tiles

MARGIN = 1.02
"""vLLM's time over these kernels' from which on they serve: a layer that was 1 % faster alone lost 2 % in a model."""

FOLDER = Path(__file__).with_name("sonic_tiles")
"""The tables that come with the package."""


@dataclass(frozen=True)
class Row:
    """Times in seconds of a layer: of these tiles, of vLLM's tuned kernels."""

    tokens: int
    tiles: Tiles
    time_s: float
    stock_s: float

    @property
    def serves(self) -> bool:
        """Whether these kernels were faster than vLLM's, by `MARGIN`."""
        return self.stock_s >= MARGIN * self.time_s


@dataclass(frozen=True)
class Table:
    """Rows in order of tokens; none = never measured."""

    rows: tuple[Row, ...]

    def tiles(self, tokens: int) -> Tiles:
        """Tiles of the row whose number of tokens is nearest, in proportion."""
        return min(self.rows, key=lambda r: abs(math.log(r.tokens / max(1, tokens)))).tiles

    def covers(self, tokens: int) -> bool:
        """Whether the rows on both sides of `tokens` serve; beyond the last row, whether that does."""
        below = [r for r in self.rows if r.tokens <= tokens]
        above = [r for r in self.rows if r.tokens >= tokens]
        sides = (below[-1:] or above[:1]) + (above[:1] or below[-1:])
        return bool(sides) and all(r.serves for r in sides)

    def served(self) -> list[int]:
        """The measured numbers of tokens that are served."""
        return [r.tokens for r in self.rows if r.serves]


def file_name(shape: Shape, device: str) -> str:
    """Name of the table of a shape and a GPU."""
    return f"{shape},device_name={device.replace(' ', '_')}.json"


def find(shape: Shape, device: str, file: str | None = None) -> Table:
    """The table of `file`, or the package's own for this shape and GPU; without rows if there is none.

    Raises:
        ConfigError: `file` cannot be read, or is for another shape or GPU.
    """
    path = Path(file).expanduser() if file else FOLDER / file_name(shape, device)
    if not file and not path.exists():
        return Table(())
    try:
        data = json.loads(path.read_text())
        made_for = Shape(**data["shape"]), data["device"]
        rows = [read_row(r) for r in data["results"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"sonic_moe.table: '{path}' is no table of tiles ({type(error).__name__}: {error}); "
            "make one with `vllm-ext moe tune MODEL --sonic`."
        ) from None
    if made_for != (shape, device):
        raise ConfigError(
            f"sonic_moe.table: '{path}' is for {made_for[0]} on {made_for[1]}, this is {shape} on {device}; "
            "run `vllm-ext moe tune MODEL --sonic` here."
        )
    return Table(tuple(sorted(rows, key=lambda r: r.tokens)))


def read_row(row: dict[str, Any]) -> Row:
    """A row of the file."""
    from vllm_ext.kernels.sonic_moe import Tile, Tiles

    tiles = row["tiles"] | {which: Tile(**row["tiles"][which]) for which in ("up", "down")}
    return Row(row["tokens"], Tiles(**tiles), row["time_s"], row["stock_s"])
