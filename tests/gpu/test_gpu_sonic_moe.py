"""The SonicMoE kernels on a GPU: against fp32, beside vLLM's Triton experts, under CUDA graphs, in any order."""

from __future__ import annotations

import pytest
import torch

from vllm_ext.kernels import reference_moe as reference
from vllm_ext.kernels.moe_route import route
from vllm_ext.kernels.sonic_moe import Tile, Tiles, sonic_moe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TILES = {
    "tensor cores, 16 rows": Tiles(Tile(16, 32, 128, 4, 4), Tile(16, 64, 64, 4, 4)),
    "64 rows": Tiles(Tile(64, 64, 64, 4, 3), Tile(64, 128, 64, 4, 3)),
    "64 rows, overlapped": Tiles(Tile(64, 64, 64, 4, 3), Tile(64, 128, 64, 4, 3), pdl=True),
    "128 rows, 64 at the end": Tiles(Tile(128, 128, 64, 8, 4, tail=64), Tile(128, 256, 64, 8, 4)),
    "128 rows, 32 at the end": Tiles(Tile(128, 128, 64, 8, 4, tail=32), Tile(128, 256, 64, 8, 4, programs=132)),
    "128 rows": Tiles(Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4)),
    "128 rows, pointers": Tiles(Tile(128, 64, 64, 4, 3, tma=False), Tile(128, 128, 64, 4, 3, tma=False)),
    "128 rows, in turns": Tiles(Tile(128, 128, 64, 8, 3, programs=132), Tile(128, 256, 64, 8, 4, programs=132)),
}
COUNTS = (0, 1, 63, 64, 65, 127, 128, 129, 1000, 1)
"""Rows of the experts, all residues of the tiles among them."""


def layer(experts: int, d: int, n: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    w13 = (torch.randn(experts, 2 * n, d, device="cuda") * d**-0.5).to(dtype)
    return w13, (torch.randn(experts, d, n, device="cuda") * n**-0.5).to(dtype)


def inputs(tokens: int, experts: int, k: int, d: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0):
    g = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, d, device="cuda", generator=g).to(dtype)
    weights, ids = torch.rand(tokens, experts, device="cuda", generator=g).softmax(-1).topk(k)
    return x, weights, ids.int()


def check(out: torch.Tensor, want: torch.Tensor) -> None:
    """Errors at most 3% of the row's RMS (bfloat16 rounding between the GEMMs alone reaches 2.4%), 0.5% on average."""
    error, rms = (out.float() - want.float()).abs(), want.float().pow(2).mean(-1, keepdim=True).sqrt()
    assert (error / rms.clamp_min(1e-6)).max() < 3e-2
    assert error.mean() / want.float().abs().mean() < 5e-3


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_rows(name: str, dtype: torch.dtype) -> None:
    d, n = 512, 192
    w13, w2 = layer(len(COUNTS), d, n, dtype)
    ids = torch.cat([torch.full((c,), e) for e, c in enumerate(COUNTS)])[:, None].int().cuda()
    ids = ids[torch.randperm(ids.shape[0], generator=torch.Generator().manual_seed(0))]
    x = torch.randn(ids.shape[0], d, device="cuda").to(dtype)
    weights = torch.rand(ids.shape, device="cuda")
    check(sonic_moe(x, w13, w2, weights, ids, TILES[name]), reference.moe(x.float(), w13, w2, weights, ids))


@pytest.mark.parametrize("tokens", [1, 3, 40, 700])
def test_beside_vllm(tokens: int) -> None:
    from vllm.model_executor.layers.fused_moe import fused_experts

    w13, w2 = layer(32, 1024, 256)
    x, weights, ids = inputs(tokens, 32, 4, 1024)
    want = reference.moe(x.float(), w13, w2, weights, ids)
    ours = sonic_moe(x, w13, w2, weights, ids, TILES["64 rows"])
    stock = fused_experts(x, w13, w2, weights, ids)
    assert (ours.float() - want).norm() < 1.1 * (stock.float() - want).norm()


def test_expert_map_and_skipped_pairs() -> None:
    w13, w2 = layer(8, 512, 128)
    x, weights, ids = inputs(300, 16, 4, 512)
    ids[5] = -1
    ids[7, 2] = -1
    expert_map = torch.full((16,), -1, dtype=torch.int32, device="cuda")
    expert_map[torch.arange(0, 16, 2)] = torch.arange(8, dtype=torch.int32, device="cuda")
    for tokens in (1, 300):
        args = x[-tokens:], w13, w2, weights[-tokens:], ids[-tokens:].contiguous()
        out = sonic_moe(*args, TILES["128 rows"], expert_map=expert_map)
        check(out, reference.moe(args[0].float(), *args[1:], expert_map))
    assert not out[5].any()


@pytest.mark.parametrize("tokens", [2, 50, 3000])
def test_route_equals_reference(tokens: int) -> None:
    _, _, ids = inputs(tokens, 128, 8, 64)
    got = route(ids, 128, 64)
    token, row, tiles = reference.route(ids, 128, 64)
    assert torch.equal(got.row.long(), row)
    assert torch.equal(got.token[: token.numel()].long(), token)
    assert got.tiles[: 4 * len(tiles)].view(-1, 4).tolist() == [list(t) for t in tiles]
    assert int(got.tiles[-1]) == len(tiles) <= got.max_tiles


@pytest.mark.parametrize(
    "name",
    ["64 rows", "64 rows, overlapped", "128 rows, 32 at the end", "128 rows, 64 at the end", "128 rows, in turns"],
)
def test_graph_equals_eager_and_order_does_not_matter(name: str) -> None:
    w13, w2 = layer(64, 1024, 256)
    x, weights, ids = inputs(900, 64, 8, 1024)
    tiles = TILES[name]
    eager = sonic_moe(x, w13, w2, weights, ids, tiles)
    turned = sonic_moe(x.flip(0), w13, w2, weights.flip(0), ids.flip(0).contiguous(), tiles)
    assert torch.equal(eager, turned.flip(0))
    held = x.clone(), weights.clone(), ids.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sonic_moe(held[0], w13, w2, held[1], held[2], tiles)
    for seed in (1, 2):  # other routing than at capture
        for to, new in zip(held, inputs(900, 64, 8, 1024, seed=seed)):
            to.copy_(new)
        graph.replay()
        assert torch.equal(out, sonic_moe(*held[:1], w13, w2, *held[1:], tiles))


def test_shared_scratch_of_output_and_first_product() -> None:
    w13, w2 = layer(16, 512, 512)
    x, weights, ids = inputs(200, 16, 2, 512)
    scratch = torch.empty(200 * 2 * 512, dtype=x.dtype, device="cuda")
    out = scratch[: x.numel()].view_as(x)
    sonic_moe(x, w13, w2, weights, ids, TILES["64 rows"], out=out, y1=scratch)
    assert torch.equal(out, sonic_moe(x, w13, w2, weights, ids, TILES["64 rows"]))
