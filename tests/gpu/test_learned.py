"""seer and lychee on a GPU: bf16 kernels at the shape of Llama-3.1-8B, SmolLM2 with the shipped files.

The fp32 kernel tests of tests/kernels run on the GPU as well where there is one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from learned import gates, roles
from paged import Paged, make
from test_gpu_engine import LENGTHS, differences, prompts, run
from test_gpu_methods import COVERING, GRAPHS, SPARSE

from vllm_ext.attention_backends.lychee import Lychee
from vllm_ext.attention_backends.seer import Seer
from vllm_ext.attention_backends.stages import DecodeBatch, StageDims, Stages

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

HEADS, GROUP, SIZE, PAGE = 8, 4, 128, 64
LENS, QUERIES = [4100, 9000, 700, 64 * 70], [1, 1, 1, 1]


def stages(name: str, layers: int, **options: Any) -> Stages:
    common = {"budget": 1024, "dense_below": 1000, "page_size": PAGE}
    if name == "seer":
        method: Any = Seer(gates=gates(layers, HEADS, GROUP, SIZE, SIZE, PAGE), **common)
    else:
        method = Lychee(roles=roles(layers, HEADS, GROUP, SIZE, 8), **common, **options)
    dims = StageDims(
        HEADS * GROUP, HEADS, SIZE, len(LENS), 16384, 1, "cuda", torch.bfloat16, tuple(range(layers))
    )  # fmt: skip
    return method.stages(dims)


def step(s: Stages, layer: int, p: Paged, kernels: bool) -> torch.Tensor:
    flags = torch.zeros(len(LENS), dtype=torch.int32, device="cuda")
    batch = DecodeBatch(p.block_table, p.seq_lens, p.query_start_loc, p.slot_mapping, flags, p.q.shape[0], 1)
    out = torch.zeros_like(p.q)
    decode = s.decode if kernels else s.reference_decode
    decode(layer, p.q, p.k_cache, p.v_cache, p.index, batch, out, p.scale)
    return out.float()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_gate_queries_and_records_in_bf16() -> None:
    """Queries, records and chosen pages: nearly all of the reference's, in rounded arithmetic."""
    p = make(LENS, QUERIES, HEADS, GROUP, SIZE, PAGE, torch.bfloat16, records=1)
    p.index.zero_()
    s, want = stages("seer", 1), stages("seer", 1)
    s.allocate()
    slots = [
        p.block_table[r, torch.arange(n, device="cuda") // PAGE].long() * PAGE + torch.arange(n, device="cuda") % PAGE
        for r, n in enumerate(LENS)
    ]
    starts = torch.tensor([0, *torch.tensor(LENS).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    prompt = DecodeBatch(
        p.block_table, p.seq_lens, starts, torch.cat(slots), torch.ones_like(p.seq_lens), sum(LENS), max(LENS)
    )
    s.write_index(0, p.q, p.k_cache, p.v_cache, p.index, prompt, p.scale)
    found = p.index.clone()
    want.reference_index(0, p.q, p.k_cache, p.v_cache, p.index, prompt, p.scale)
    full = [int(x) for r, n in enumerate(LENS) for x in p.block_table[r, : n // PAGE]]
    assert relative(found[full].float(), p.index[full].float()) < 1e-2
    a, b = step(s, 0, p, True), step(want, 0, p, False)
    kept = [set(s.lists.ids[0, h].tolist()) for h in range(HEADS)]
    again = want.reference_select(0, next(iter(want.rows(_batch(p), PAGE))), p.q[:1], p.k_cache, p.index, p.scale)[0]
    same = sum(len(kept[h] & set(again[h].tolist())) for h in range(HEADS)) / again.numel()
    assert same > 0.97
    assert relative(a[2], b[2]) < 1e-2  # the short request is dense
    assert torch.isfinite(a).all()
    assert s.stats.tolist() == want.stats.tolist()


def _batch(p: Paged) -> DecodeBatch:
    flags = torch.zeros(len(LENS), dtype=torch.int32, device="cuda")
    return DecodeBatch(p.block_table, p.seq_lens, p.query_start_loc, p.slot_mapping, flags, p.q.shape[0], 1)


def test_mixed_launch_in_bf16() -> None:
    """Four layers; random keys tie almost nowhere, so lists equal the reference's but for a few pages."""
    s, want = stages("lychee", 4), stages("lychee", 4)
    s.allocate()
    for layer in range(4):
        p = make(LENS, QUERIES, HEADS, GROUP, SIZE, PAGE, torch.bfloat16, seed=layer)
        first = make(LENS, QUERIES, HEADS, GROUP, SIZE, PAGE, torch.bfloat16)
        p.block_table, p.slot_mapping = first.block_table, first.slot_mapping
        a, b = step(s, layer, p, True), step(want, layer, p, False)
        assert relative(a, b) < (2e-2 if layer == 0 else 0.2)
        lists = s.buffers.ids[0]
        same = sum(len(set(lists[h].tolist()) & set(want.carried[0][h].tolist())) for h in range(HEADS))
        assert same > 0.97 * want.carried[0].numel()
    assert s.stats.tolist() == want.stats.tolist()


def test_first_and_last_pages_in_bf16() -> None:
    """Layer 0 of the static split has retrieval heads alone, layer 1 one of eight."""
    s, want = (stages("lychee", 2, others="recent") for _ in range(2))
    s.allocate()
    for layer in range(2):
        p = make(LENS, QUERIES, HEADS, GROUP, SIZE, PAGE, torch.bfloat16, seed=layer)
        assert relative(step(s, layer, p, True), step(want, layer, p, False)) < 2e-2
    assert s.stats.tolist() == want.stats.tolist()


@pytest.mark.parametrize("name", ["seer", "lychee"])
def test_a_graph_replays_for_other_lengths(name: str) -> None:
    """Captured once; replayed with shorter and longer requests it gives what an eager step gives."""
    s = stages(name, 1)
    s.allocate()
    p = make(LENS, QUERIES, HEADS, GROUP, SIZE, PAGE, torch.bfloat16, records=1)
    p.index.normal_()
    batch, out = _batch(p), torch.zeros_like(p.q)
    graph = torch.cuda.CUDAGraph()
    s.decode(0, p.q, p.k_cache, p.v_cache, p.index, batch, out, p.scale)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        s.decode(0, p.q, p.k_cache, p.v_cache, p.index, batch, out, p.scale)
    for lens in ([1500, 64, 700, 4480], [4100, 9000, 1, 2048], LENS):
        p.seq_lens.copy_(torch.tensor(lens))
        out.zero_()
        graph.replay()
        got = out.clone()
        out.zero_()
        s.decode(0, p.q, p.k_cache, p.v_cache, p.index, batch, out, p.scale)
        torch.cuda.synchronize()
        assert torch.equal(got, out)
        assert got.abs().sum(-1).min() > 0


@pytest.fixture(scope="module")
def stock(smollm2_dir: str) -> dict[str, Any]:
    return run(smollm2_dir, {}, prompts())


ROWS: dict[str, dict[str, Any]] = {"seer": {}, "lychee": {}, "lychee recent": {"others": "recent"}}
"""A further row of a method has a word behind the name."""


@pytest.mark.parametrize("name", ROWS)
def test_room_for_every_key_is_stock(smollm2_dir: str, stock: dict[str, Any], name: str) -> None:
    found = run(smollm2_dir, {name.split()[0]: COVERING | ROWS[name]}, prompts(), **GRAPHS)
    assert "FULL" in found["mode"]
    assert not differences(stock, found, 0)
    assert not differences(stock, found, 1)
    read, visible, _, pages, *_ = found["stats"]
    assert read == visible > 0
    assert pages > 0


@pytest.mark.parametrize("name", ROWS)
def test_sparse_lists_in_graphs(smollm2_dir: str, stock: dict[str, Any], name: str) -> None:
    """Prompts are exact, so first tokens are stock's; most texts are, with trained files."""
    found = run(smollm2_dir, {name.split()[0]: SPARSE | ROWS[name]}, prompts(), **GRAPHS)
    first = [[t[0] for t in x["tokens"][0]] for x in (found, stock)]
    assert sum(a == b for a, b in zip(*first)) >= len(LENGTHS) - 1
    read, visible, scored, pages, *_ = found["stats"]
    print(f"{name}: density {read / visible:.3f}, {pages} pages read, differences {differences(stock, found, 0)}")
    assert 0.05 < read / visible < 0.9
    assert (scored > 0) == (name == "seer")
