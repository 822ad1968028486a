"""Gated expert layers as grouped GEMMs: SonicMoE (arXiv 2512.14080, section 4), inference only, in Triton for Hopper.

Specification: `reference_moe.moe`. After the sort of `moe_route`, three launches:

* `_up` gathers the tokens of an expert's rows in its loads and ends with SwiGLU: the tiles of gate and up projection
  for the same columns share the loads of the tokens, so that only `silu(g) * u` is written between the two GEMMs.
* `_down` writes its rows in the order of experts: no scatter, no atomics.
* `_combine` gathers the k rows of a token, and adds them with their weights in fp32 in the order of the slots.

Weights stay as vLLM stores them, so that stock kernels and EPLB can share them. Rows are never padded: only the last
tile of an expert is partly idle. With few pairs each one is a tile of its own and nothing is sorted. Which row a token
lands in changes no bit of its result: every row is a product of its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm_ext.kernels.moe_route import Route, local_expert, overlap_launches, pdl_options, route


@triton.jit
def _tile(
    p, TILES, IDS, MAP, NT, E: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr,
    NAIVE: tl.constexpr, HAS_MAP: tl.constexpr,
):  # fmt: skip
    """(expert, first row, live rows, column tile) of tile p.

    The row tiles of an expert run fastest, `GROUP` at a time, so that they read a tile of its weights together.
    """
    slot = p // NT
    if NAIVE:
        e = local_expert(tl.load(IDS + slot), MAP, slot >= 0, E, HAS_MAP)
        live = tl.where(e < E, 1, 0)
        e = tl.minimum(e, E - 1)
        row = slot
        n = p % NT
    else:
        e = tl.load(TILES + slot * 4)
        first = tl.load(TILES + slot * 4 + 1)
        rows = tl.load(TILES + slot * 4 + 2)
        start = tl.load(TILES + slot * 4 + 3)
        at = p - first * NT
        group = at // (GROUP * NT)
        width = tl.minimum(tl.cdiv(rows, BM) - group * GROUP, GROUP)
        inside = at % (GROUP * NT)
        m = group * GROUP + inside % width
        n = inside // width
        row = start + m * BM
        live = tl.minimum(rows - m * BM, BM)
    return e, row, live, n


@triton.jit
def _end(first, TILES, tiles, NT, PROGRAMS: tl.constexpr, NAIVE: tl.constexpr):
    """Tiles of the launch; with one tile a program at least whether there is one, read from the tile's own record."""
    if NAIVE:
        end = tiles * NT
    elif PROGRAMS > 0:
        end = tl.load(TILES + tiles * 4) * NT
    else:
        end = tl.where(tl.load(TILES + first // NT * 4) >= 0, first + 1, 0)
    return end


@triton.jit
def _weights(W, row, col, rows, cols, last, stride, TMA: tl.constexpr):
    """A tile of weights [BN, BK] at (row, col); without TMA rows stop at `last`, so that nothing outside is read."""
    if TMA:
        tile = W.load([row, col])
    else:
        at = tl.minimum(row + rows, last).to(tl.int64)
        tile = tl.load(W + at[:, None] * stride + (col + cols)[None, :])
    return tile


@triton.jit
def _up_rows(
    e, row, live, nt, X, W, Y, TOKEN, x_row,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, NAIVE: tl.constexpr,
):  # fmt: skip
    """Y[row] = silu(W1 x) * (W3 x) for at most BM rows of an expert and BN columns."""
    rm = tl.arange(0, BM)
    rn = tl.arange(0, BN)
    rk = tl.arange(0, BK)
    alive = (rm < live)[:, None]  # idle rows read nothing: they would all ask for one token
    if NAIVE:
        token = rm * 0 + row // K
    else:
        token = tl.load(TOKEN + row + rm, mask=rm < live, other=0)
    at = X + token.to(tl.int64)[:, None] * x_row + rk[None, :]
    gate_row = e * (2 * N) + nt * BN
    last = E * (2 * N) - 1
    gate = tl.zeros([BM, BN], tl.float32)
    up = tl.zeros([BM, BN], tl.float32)
    for k in range(0, D, BK):
        g = _weights(W, gate_row, k, rn, rk, last, D, TMA)  # before the tokens: their addresses are known at once
        u = _weights(W, gate_row + N, k, rn, rk, last, D, TMA)
        x = tl.load(at + k, mask=alive, other=0.0)
        gate = tl.dot(x, g.T, gate, input_precision="ieee")
        up = tl.dot(x, u.T, up, input_precision="ieee")
    y = (gate / (1.0 + tl.exp(-gate)) * up).to(Y.dtype.element_ty)
    col = nt * BN + rn
    out = Y + (row + rm).to(tl.int64)[:, None] * N + col[None, :]
    tl.store(out, y, mask=alive & (col < N)[None, :])


@triton.jit
def _up_tile(
    p, X, W, Y, TOKEN, TILES, IDS, MAP, x_row,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, TAIL: tl.constexpr,
    TMA: tl.constexpr, NAIVE: tl.constexpr, HAS_MAP: tl.constexpr,
):  # fmt: skip
    """`_up_rows` for tile p; the last rows of an expert take a smaller tile if they fit."""
    e, row, live, nt = _tile(p, TILES, IDS, MAP, (N + BN - 1) // BN, E, BM, GROUP, NAIVE, HAS_MAP)
    if TAIL > 0:
        if live <= TAIL:
            _up_rows(e, row, live, nt, X, W, Y, TOKEN, x_row, E, K, D, N, TAIL, BN, BK, TMA, NAIVE)
        else:
            _up_rows(e, row, live, nt, X, W, Y, TOKEN, x_row, E, K, D, N, BM, BN, BK, TMA, NAIVE)
    else:
        _up_rows(e, row, live, nt, X, W, Y, TOKEN, x_row, E, K, D, N, BM, BN, BK, TMA, NAIVE)


@triton.jit(do_not_specialize=["tiles"])
def _up(
    X, W, Y, TOKEN, TILES, IDS, MAP, x_row, tiles,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    TAIL: tl.constexpr, TMA: tl.constexpr, NAIVE: tl.constexpr, HAS_MAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`_up_tile` for every tile: one a program, or in turns by `PROGRAMS` programs."""
    overlap_launches(PDL)
    first = tl.program_id(0)
    total = _end(first, TILES, tiles, (N + BN - 1) // BN, PROGRAMS, NAIVE)
    if PROGRAMS > 0:
        for p in tl.range(first, total, PROGRAMS, flatten=True):
            _up_tile(
                p, X, W, Y, TOKEN, TILES, IDS, MAP, x_row, E, K, D, N, BM, BN, BK, GROUP, TAIL, TMA, NAIVE, HAS_MAP
            )  # fmt: skip
    elif first < total:
        _up_tile(
            first, X, W, Y, TOKEN, TILES, IDS, MAP, x_row, E, K, D, N, BM, BN, BK, GROUP, TAIL, TMA, NAIVE, HAS_MAP
        )  # fmt: skip


@triton.jit
def _down_tile(
    p, A, Y, W, OUT, TILES, IDS, MAP,
    E: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, NAIVE: tl.constexpr, HAS_MAP: tl.constexpr,
):  # fmt: skip
    """OUT[row] = W2 y[row] for a tile of BM rows and BN columns."""
    e, row, live, nt = _tile(p, TILES, IDS, MAP, (D + BN - 1) // BN, E, BM, GROUP, NAIVE, HAS_MAP)
    rm = tl.arange(0, BM)
    rn = tl.arange(0, BN)
    rk = tl.arange(0, BK)
    at = Y + (row + tl.minimum(rm, tl.maximum(live, 1) - 1)).to(tl.int64)[:, None] * N + rk[None, :]
    weight_row = e * D + nt * BN
    last = E * D - 1
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, N, BK):
        if TMA:
            y = A.load([row, k])
        else:
            y = tl.load(at + k)
        w = _weights(W, weight_row, k, rn, rk, last, N, TMA)
        acc = tl.dot(y, w.T, acc, input_precision="ieee")
    col = nt * BN + rn
    out = OUT + (row + rm).to(tl.int64)[:, None] * D + col[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=(rm < live)[:, None] & (col < D)[None, :])


@triton.jit(do_not_specialize=["tiles"])
def _down(
    A, Y, W, OUT, TILES, IDS, MAP, tiles,
    E: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    TMA: tl.constexpr, NAIVE: tl.constexpr, HAS_MAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`_down_tile` for every tile: one a program, or in turns by `PROGRAMS` programs."""
    overlap_launches(PDL)
    first = tl.program_id(0)
    total = _end(first, TILES, tiles, (D + BN - 1) // BN, PROGRAMS, NAIVE)
    if PROGRAMS > 0:
        for p in tl.range(first, total, PROGRAMS, flatten=True):
            _down_tile(p, A, Y, W, OUT, TILES, IDS, MAP, E, D, N, BM, BN, BK, GROUP, TMA, NAIVE, HAS_MAP)
    elif first < total:
        _down_tile(first, A, Y, W, OUT, TILES, IDS, MAP, E, D, N, BM, BN, BK, GROUP, TMA, NAIVE, HAS_MAP)


@triton.jit
def _combine(
    Y, WEIGHTS, ROW, IDS, MAP, OUT,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    NAIVE: tl.constexpr, HAS_MAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """OUT[t] = sum_j WEIGHTS[t, j] * Y[row of pair (t, j)], fp32, slots in order; skipped pairs add nothing."""
    overlap_launches(PDL)
    t = tl.program_id(0)
    col = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros([BD], tl.float32)
    for j in tl.static_range(K):
        pair = t * K + j
        if NAIVE:
            e = local_expert(tl.load(IDS + pair), MAP, pair >= 0, E, HAS_MAP)
            row = tl.where(e < E, pair, -1)
        else:
            row = tl.load(ROW + pair)
        width = tl.where(row >= 0, D, 0)
        y = tl.load(Y + row.to(tl.int64) * D + col, mask=col < width, other=0.0)
        acc += tl.load(WEIGHTS + pair).to(tl.float32) * y.to(tl.float32)
    tl.store(OUT + t.to(tl.int64) * D + col, acc.to(OUT.dtype.element_ty), mask=col < D)


@dataclass(frozen=True)
class Tile:
    """Tile of a GEMM.

    Attributes:
        bm, bn, bk: rows (the same for both GEMMs), columns, depth.
        warps, stages: of the program, of its pipeline.
        group: row tiles of an expert that run together.
        tma: the tensor memory accelerator loads what is contiguous.
        programs: each one works through several tiles, loading the next during the end of the last; 0 = one tile each.
        tail: of the up projection: rows of a smaller tile for the last rows of an expert, where they fit; 0 = none, as
            with `programs`. Both add in the same order, and on an H100 a row has the same bits in either.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    group: int = 8
    tma: bool = True
    programs: int = 0
    tail: int = 0


@dataclass(frozen=True)
class Tiles:
    """Tiles of both GEMMs; `up.bn` columns of the gate and as many of the up projection are one tile.

    `pdl`: each launch is set up while the one before it still runs (programmatic dependent launch).
    """

    up: Tile
    down: Tile
    pdl: bool = False

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def default_tiles(rows: float) -> Tiles:
    """Tiles for a layer that was not measured, from the mean number of rows of an expert."""
    if rows <= 8:
        return Tiles(Tile(16, 32, 128, 4, 4), Tile(16, 64, 128, 4, 4))
    if rows <= 64:
        return Tiles(Tile(64, 64, 64, 4, 3), Tile(64, 128, 64, 4, 3))
    return Tiles(Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4))


def supports(d: int, n: int) -> str:
    """Why the kernels cannot run experts of hidden size d and width n, or ""."""
    if d % 64 or n % 64:
        return f"hidden size {d} and expert width {n} must be multiples of 64"
    return ""


def unsorted(pairs: int, experts: int) -> bool:
    """Whether each pair gets a tile of its own: so few that experts are hardly hit twice."""
    return pairs * 4 <= experts


def sonic_moe(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    tiles: Tiles,
    *,
    expert_map: Tensor | None = None,
    out: Tensor | None = None,
    y1: Tensor | None = None,
    y2: Tensor | None = None,
) -> Tensor:
    """Weighted sum over a token's experts; shapes and dtypes as in `reference_moe`, the 16-bit ones on a GPU.

    Args:
        x: [T, d], contiguous rows. w13, w2: contiguous.
        weights: [T, k]. ids: [T, k], contiguous.
        out: [T, d], may share memory with `y1` but not with `y2` or `x`.
        y1, y2: scratch of at least T * k * n and T * k * d elements, contiguous; allocated unless given.

    Returns:
        [T, d] in the dtype of x. Launches and allocations depend on shapes alone, so the call can be captured.

    Raises:
        ValueError: sizes that `supports` names, or strided inputs.
    """
    if reason := supports(w2.shape[1], w2.shape[2]):
        raise ValueError(reason)
    if x.stride(1) != 1 or not all(t.is_contiguous() for t in (w13, w2, weights, ids)):
        raise ValueError("weights, ids and the rows of x must be contiguous")
    (tokens, k), (experts, d, n) = ids.shape, w2.shape
    out = torch.empty_like(x) if out is None else out
    if tokens == 0:
        return out
    pairs = tokens * k
    y1 = x.new_empty(pairs * n) if y1 is None else y1
    y2 = x.new_empty(pairs * d) if y2 is None else y2
    y1, y2 = y1.view(-1)[: pairs * n].view(pairs, n), y2.view(-1)[: pairs * d].view(pairs, d)
    naive = unsorted(pairs, experts)
    plan = _each_its_own(ids, pairs, tiles) if naive else route(ids, experts, tiles.up.bm, expert_map, tiles.pdl)
    flags = {"NAIVE": naive, "HAS_MAP": expert_map is not None, "PDL": tiles.pdl, **pdl_options(tiles.pdl)}
    mapping = ids if expert_map is None else expert_map
    up(x, w13, y1, plan, ids, mapping, k, tiles.up, flags)
    down(y1, w2, y2, plan, ids, mapping, tiles.down, flags)
    combine(y2, weights, plan, ids, mapping, out, experts, flags)
    return out


def _each_its_own(ids: Tensor, pairs: int, tiles: Tiles) -> Route:
    """The plan of a call without a sort: pair p is row p and tile p."""
    return Route(token=ids, row=ids, tiles=ids, max_tiles=pairs, block_m=tiles.up.bm)


def _turns(tile: Tile, most: int) -> int:
    """Programs that share the tiles, or 0 if each tile has one of its own."""
    return tile.programs if tile.programs < most else 0


def up(
    x: Tensor, w13: Tensor, y1: Tensor, plan: Route, ids: Tensor, mapping: Tensor, k: int, tile: Tile, flags: dict
) -> None:
    """Launch `_up`: y1 [P, n]."""
    (experts, two_n, d), n = w13.shape, w13.shape[1] // 2
    weights: Any = w13
    if tile.tma:
        weights = TensorDescriptor(w13, [experts * two_n, d], [d, 1], [tile.bn, tile.bk])
    most = plan.max_tiles * -(-n // tile.bn)
    _up[(min(tile.programs or most, most),)](
        x, weights, y1, plan.token, plan.tiles, ids, mapping, x.stride(0), plan.max_tiles,
        E=experts, K=k, D=d, N=n, BM=tile.bm, BN=tile.bn, BK=tile.bk, GROUP=tile.group,
        PROGRAMS=_turns(tile, most), TAIL=0 if flags["NAIVE"] else tile.tail, TMA=tile.tma,
        num_warps=tile.warps, num_stages=tile.stages, **flags,
    )  # fmt: skip


def down(
    y1: Tensor, w2: Tensor, y2: Tensor, plan: Route, ids: Tensor, mapping: Tensor, tile: Tile, flags: dict
) -> None:
    """Launch `_down`: y2 [P, d]."""
    experts, d, n = w2.shape
    weights: Any = w2
    rows: Any = y1
    if tile.tma:
        weights = TensorDescriptor(w2, [experts * d, n], [n, 1], [tile.bn, tile.bk])
        rows = TensorDescriptor(y1, list(y1.shape), [n, 1], [tile.bm, tile.bk])
    most = plan.max_tiles * -(-d // tile.bn)
    _down[(min(tile.programs or most, most),)](
        rows, y1, weights, y2, plan.tiles, ids, mapping, plan.max_tiles,
        E=experts, D=d, N=n, BM=tile.bm, BN=tile.bn, BK=tile.bk, GROUP=tile.group,
        PROGRAMS=_turns(tile, most), TMA=tile.tma,
        num_warps=tile.warps, num_stages=tile.stages, **flags,
    )  # fmt: skip


def combine(
    y2: Tensor, weights: Tensor, plan: Route, ids: Tensor, mapping: Tensor, out: Tensor, experts: int, flags: dict
) -> None:
    """Launch `_combine`: out [T, d]."""
    (tokens, k), d = ids.shape, y2.shape[1]
    width = min(triton.next_power_of_2(d), 256 if tokens < 64 else 2048)
    _combine[(tokens, -(-d // width))](
        y2, weights, plan.row, ids, mapping, out,
        E=experts, K=k, D=d, BD=width, num_warps=max(1, width // 512), **flags,
    )  # fmt: skip
