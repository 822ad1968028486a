"""Clusters of pages (tactic, centroids=kmeans) on a GPU: bf16 records and lists at the shape of Llama-3.1-8B, graphs.

The fp32 kernel tests of tests/kernels run on the GPU as well where there is one; engines are in test_gpu_methods.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from paged import Paged, make

from vllm_ext.attention_backends.stages import DecodeBatch, StageDims, Stages
from vllm_ext.attention_backends.tactic import Tactic
from vllm_ext.kernels import reference_clusters
from vllm_ext.kernels.page_clusters import update_clusters

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

HEADS, GROUP, SIZE, PAGE, CLUSTERS = 8, 4, 128, 64, 4
LENS = [4100, 9000, 700, 64 * 70]


def paged() -> tuple[Paged, torch.Tensor]:
    """A cache without records, and the slots of all of its keys."""
    p = make(LENS, [1] * len(LENS), HEADS, GROUP, SIZE, PAGE, torch.bfloat16, records=CLUSTERS + 1)
    p.index.zero_()
    slots = []
    for r, n in enumerate(LENS):
        at = torch.arange(n, device="cuda")
        slots.append(p.block_table[r, at // PAGE].long() * PAGE + at % PAGE)
    return p, torch.cat(slots)


def stages() -> Stages:
    method = Tactic(centroids="kmeans", mass=0.7, budget=4096, dense_below=1000, page_size=PAGE)
    assert method.clusters == CLUSTERS
    return method.stages(StageDims(HEADS * GROUP, HEADS, SIZE, len(LENS), 16384, 1, "cuda", torch.bfloat16, (0,)))


def batch(p: Paged) -> DecodeBatch:
    flags = torch.zeros(len(LENS), dtype=torch.int32, device="cuda")
    return DecodeBatch(p.block_table, p.seq_lens, p.query_start_loc, p.slot_mapping, flags, p.q.shape[0], 1)


def test_records_in_bf16() -> None:
    """Nearly all pages have the reference's clusters: sums in another order may move a key between two of them."""
    p, slots = paged()
    want = p.index.clone()
    reference_clusters.update(p.k_cache, want, slots, CLUSTERS, 10)
    update_clusters(p.k_cache, p.index, slots, CLUSTERS, 10)
    full = torch.tensor([x for r, n in enumerate(LENS) for x in p.block_table[r, : n // PAGE].tolist()], device="cuda")
    found, expected = p.index[full].float(), want[full].float()
    counts, wanted = found[:, :, CLUSTERS, :CLUSTERS], expected[:, :, CLUSTERS, :CLUSTERS]
    assert (counts.sum(-1) == PAGE).all()
    same = (counts == wanted).all(-1)
    print(f"{same.float().mean():.4f} of {same.numel()} pages have equal counts")
    assert same.float().mean() > 0.95
    torch.testing.assert_close(found[:, :, :CLUSTERS][same], expected[:, :, :CLUSTERS][same], atol=0.1, rtol=0.02)
    again = p.index.clone()
    update_clusters(p.k_cache, p.index, slots, CLUSTERS, 10)
    assert torch.equal(p.index, again)


def test_steps_equal_the_reference() -> None:
    p, slots = paged()
    reference_clusters.update(p.k_cache, p.index, slots, CLUSTERS, 10)
    s, want = stages(), stages()
    s.allocate()
    out, expected = torch.zeros_like(p.q), torch.zeros_like(p.q)
    s.decode(0, p.q, p.k_cache, p.v_cache, p.index, batch(p), out, p.scale)
    want.reference_decode(0, p.q, p.k_cache, p.v_cache, p.index, batch(p), expected, p.scale)
    short = out[2].float() - expected[2].float()
    assert short.norm() / expected[2].float().norm() < 1e-2  # dense
    (read, visible, *_), (wanted, *_) = s.stats.tolist(), want.stats.tolist()
    print(f"density {read / visible:.3f}, of the reference {wanted / visible:.3f}")
    assert abs(read - wanted) < 0.05 * wanted
    assert torch.isfinite(out).all()


def test_a_graph_replays_for_other_lengths() -> None:
    """Captured once; replayed with shorter and longer requests it gives what an eager step gives."""
    p, slots = paged()
    update_clusters(p.k_cache, p.index, slots, CLUSTERS, 10)
    s, out = stages(), torch.zeros_like(p.q)
    s.allocate()
    step = (0, p.q, p.k_cache, p.v_cache, p.index, batch(p), out, p.scale)
    s.decode(*step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        s.decode(*step)
    for lens in ([1500, 64, 700, 4480], [4100, 9000, 1, 2048], LENS):
        p.seq_lens.copy_(torch.tensor(lens))
        graph.replay()
        got = out.clone()
        s.decode(*step)
        torch.cuda.synchronize()
        assert torch.equal(got, out)
        assert got.abs().sum(-1).min() > 0
