"""The expert kernels against their plain-PyTorch reference, in the interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch

from vllm_ext.kernels import reference_moe as reference
from vllm_ext.kernels.moe_route import ONE_CHUNK, max_tiles, route
from vllm_ext.kernels.sonic_moe import Tile, Tiles, default_tiles, sonic_moe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNTS = (0, 1, 15, 16, 17, 31, 32, 33, 0, 100)
"""Rows of the experts: all residues of the tiles, empty experts in the middle and at the start."""
TILES = {
    "tma": Tiles(Tile(32, 32, 64, 4, 3), Tile(32, 64, 64, 4, 3)),
    "pointers": Tiles(Tile(32, 32, 32, 4, 3, tma=False), Tile(32, 64, 32, 4, 3, tma=False)),
    "in turns": Tiles(Tile(32, 32, 32, 4, 3, programs=3), Tile(32, 64, 32, 4, 3, programs=5)),
    "smaller tiles at the end": Tiles(Tile(32, 32, 64, 4, 3, tail=16), Tile(32, 64, 64, 4, 3)),
    "smaller tiles, pointers": Tiles(Tile(64, 32, 32, 4, 3, tma=False, tail=16), Tile(64, 64, 32, 4, 3, tma=False)),
    "groups of one": Tiles(Tile(16, 64, 64, 4, 3, group=1), Tile(16, 64, 64, 4, 3, group=2)),
}


def layer(experts: int, d: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    w13 = torch.randn(experts, 2 * n, d, generator=g) * d**-0.5
    w2 = torch.randn(experts, d, n, generator=g) * n**-0.5
    return w13.to(DEVICE, dtype), w2.to(DEVICE, dtype)


def inputs(tokens: int, experts: int, k: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    weights, ids = torch.rand(tokens, experts, generator=g).softmax(-1).topk(k)
    return torch.randn(tokens, d, generator=g).to(DEVICE, dtype), weights.to(DEVICE), ids.int().to(DEVICE)


def error(out: torch.Tensor, want: torch.Tensor) -> float:
    return ((out.float() - want.float()).norm() / want.float().norm()).item()


@pytest.mark.parametrize("name", TILES)
def test_every_number_of_rows(name: str) -> None:
    w13, w2 = layer(len(COUNTS), 64, 64)
    ids = torch.cat([torch.full((c,), e) for e, c in enumerate(COUNTS)])[:, None].int()
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].to(DEVICE)
    x, _, _ = inputs(len(ids), 2, 1, 64)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    assert error(sonic_moe(x, w13, w2, weights, ids, TILES[name]), reference.moe(x, w13, w2, weights, ids)) < 1e-5


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "d", "n"),
    [(1, 32, 4, 64, 128), (2, 64, 8, 128, 64), (40, 7, 2, 192, 64), (30, 4, 4, 64, 192), (25, 3, 1, 64, 64)],
)
def test_shapes(name: str, tokens: int, experts: int, k: int, d: int, n: int) -> None:
    w13, w2 = layer(experts, d, n, torch.float16)
    x, weights, ids = inputs(tokens, experts, k, d, torch.float16)
    want = reference.moe(x.float(), w13, w2, weights, ids)
    assert error(sonic_moe(x, w13, w2, weights, ids, TILES[name]), want) < 2e-3


@pytest.mark.parametrize("tokens", [1, 50])
def test_expert_map_and_skipped_pairs(tokens: int) -> None:
    w13, w2 = layer(8, 64, 64)
    x, weights, ids = inputs(tokens, 16, 2, 64)
    ids[0, 1] = -1
    if tokens > 1:
        ids[3] = -1
    expert_map = torch.full((16,), -1, dtype=torch.int32, device=DEVICE)
    expert_map[torch.arange(1, 16, 2)] = torch.arange(8, dtype=torch.int32, device=DEVICE).flip(0)
    scratch = torch.full((tokens * 2 * 64,), float("nan"), device=DEVICE)  # rows of skipped pairs are never read
    out = sonic_moe(x, w13, w2, weights, ids, TILES["tma"], expert_map=expert_map, y1=scratch, y2=scratch.clone())
    torch.testing.assert_close(out, reference.moe(x, w13, w2, weights, ids, expert_map), rtol=1e-4, atol=1e-5)
    assert tokens == 1 or not out[3].any()


def test_output_may_share_the_scratch_of_the_first_product() -> None:
    w13, w2 = layer(6, 64, 64)
    x, weights, ids = inputs(20, 6, 2, 64)
    scratch = torch.empty(20 * 2 * 64, device=DEVICE)
    out = sonic_moe(x, w13, w2, weights, ids, TILES["tma"], out=scratch[: x.numel()].view_as(x), y1=scratch)
    assert torch.equal(out, sonic_moe(x, w13, w2, weights, ids, TILES["tma"]))


def test_order_of_the_tokens_changes_no_bit() -> None:
    w13, w2 = layer(5, 64, 64)
    x, weights, ids = inputs(33, 5, 2, 64)
    out = sonic_moe(x, w13, w2, weights, ids, TILES["tma"])
    turned = sonic_moe(x.flip(0), w13, w2, weights.flip(0), ids.flip(0).contiguous(), TILES["tma"])
    assert torch.equal(out, turned.flip(0))


def test_no_tokens() -> None:
    w13, w2 = layer(4, 64, 64)
    x, weights, ids = inputs(5, 4, 2, 64)
    assert sonic_moe(x[:0], w13, w2, weights[:0], ids[:0], TILES["tma"]).shape == (0, 64)


def test_odd_sizes_are_refused() -> None:
    w13, w2 = layer(4, 64, 48)
    x, weights, ids = inputs(5, 4, 2, 64)
    with pytest.raises(ValueError, match="multiples of 64"):
        sonic_moe(x, w13, w2, weights, ids, TILES["tma"])


@pytest.mark.parametrize("block_m", [16, 128])
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "mapped"),
    [(40, 7, 2, False), (64, 8, 8, False), (ONE_CHUNK // 2 + 1, 64, 2, False), (180, 130, 3, True), (1, 4, 4, True)],
)
def test_route(tokens: int, experts: int, k: int, mapped: bool, block_m: int) -> None:
    _, _, ids = inputs(tokens, experts, k, 64)
    ids[0, 0] = -1
    expert_map, local = None, experts
    if mapped:
        local = experts // 2
        expert_map = torch.full((experts,), -1, dtype=torch.int32, device=DEVICE)
        expert_map[torch.randperm(experts)[:local]] = torch.arange(local, dtype=torch.int32, device=DEVICE)
    token, row, tiles = reference.route(ids, local, block_m, expert_map)
    got = route(ids, local, block_m, expert_map)
    assert torch.equal(got.row.long(), row)
    assert torch.equal(got.token[: token.numel()].long(), token)
    records = got.tiles[:-1].view(-1, 4)
    assert [tuple(r) for r in records[: len(tiles)].tolist()] == tiles
    assert (records[len(tiles) :, 0] == -1).all()
    assert int(got.tiles[-1]) == len(tiles) <= got.max_tiles


@pytest.mark.parametrize("counts", [[1] * 7 + [94], [33] * 3, [101], [0, 0, 5]])
def test_bound_of_the_tiles(counts: list[int]) -> None:
    assert sum(-(-c // 16) for c in counts) <= max_tiles(sum(counts), len(counts), 16)


@pytest.mark.parametrize("rows", [0.1, 8, 64, 1000])
def test_default_tiles_have_rows_in_common(rows: float) -> None:
    tiles = default_tiles(rows)
    assert tiles.up.bm == tiles.down.bm


def test_reference_is_the_definition() -> None:
    w13, w2 = layer(3, 4, 5)
    x, weights, ids = inputs(2, 3, 2, 4)
    ids[1, 1] = -1
    want = torch.zeros(2, 4, device=DEVICE)
    for t in range(2):
        for j in range(2):
            if (e := int(ids[t, j])) >= 0:
                gate, up = w13[e, :5] @ x[t], w13[e, 5:] @ x[t]
                want[t] += weights[t, j] * (w2[e] @ (gate * torch.sigmoid(gate) * up))
    torch.testing.assert_close(reference.moe(x, w13, w2, weights, ids), want)
