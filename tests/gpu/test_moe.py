"""MoE plugins on a GPU: router kernels against their reference, engines with graphs against eager and stock ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clear_routers import far_apart
from fixed_cache import FIXED_CACHE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LENGTHS = (3, 40, 130, 300, 700)
TIE = 0.5
"""Nats: bfloat16 rounds differently in other batches and kernels, and may then choose another expert."""
OUTPUT = 24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (60, 4), (64, 8), (128, 8), (512, 10)])
@pytest.mark.parametrize("tokens", [1, 7, 64, 1000, 16384])
def test_router_kernels_equal_the_reference(tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
    """fp32 weights to 1e-5; bfloat16 logits tie often, so experts are compared through the values they have."""
    from vllm_ext.kernels import reference_routing, route_topk

    generator = torch.Generator("cuda").manual_seed(tokens)
    logits, heads = (
        torch.randn(tokens, e, generator=generator, device="cuda").to(dtype) for e in (experts, 2 * experts)
    )
    high, low = (torch.nn.functional.softplus(heads.float()) + 1e-3).chunk(2, 1)
    pairs = [(route_topk.kern(logits, top_k, 2.0), reference_routing.kern(logits, top_k, 2.0))]
    for cut in (None, 0.5):
        got = route_topk.dirmoe(logits, top_k, 0.5, heads, 1e-3, 9.0, cut)
        pairs.append((got, reference_routing.dirmoe(logits, top_k, 0.5, high, low, cut)))
    for got, want in pairs:
        assert torch.allclose(got[0], want[0], atol=1e-5, rtol=1e-4)
        assert torch.equal(got[1] < 0, want[1] < 0)
        values = [logits.float().gather(1, ids.clamp(min=0).long()).masked_fill(ids < 0, 0) for _, ids in (got, want)]
        if got is pairs[0][0]:  # KERN keeps the order of the logits
            assert torch.equal(*values)


def run(model: Path, plugins: dict[str, dict[str, Any]] | None, **extra: Any) -> dict[str, Any]:
    """Greedy tokens of two orders of one batch, routed experts where they are returned, and the layer classes."""
    from vllm import SamplingParams

    import vllm_ext
    from vllm_ext.evaluation.engine import engine

    rnd = random.Random(0)
    prompts = [[rnd.randrange(3, 250) for _ in range(n)] for n in LENGTHS]
    args = {"dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": 16, "max_num_batched_tokens": 256, "seed": 0}
    args |= FIXED_CACHE | {"skip_tokenizer_init": True, "enforce_eager": True} | extra
    ours = vllm_ext.engine_args(*plugins, **plugins) if plugins else {}
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True, detokenize=False, logprobs=5)
    with engine(model, args | ours) as llm:
        out = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        back = llm.generate([{"prompt_token_ids": p} for p in prompts[::-1]], params, use_tqdm=False)[::-1]
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        layer = next(m for m in worker.get_model().modules() if hasattr(m, "routed_experts"))
        return {
            "tokens": [list(o.outputs[0].token_ids) for o in out],
            "reversed": [list(o.outputs[0].token_ids) for o in back],
            "logprobs": [o.outputs[0].logprobs for o in out],
            "routed": [getattr(o.outputs[0], "routed_experts", None) for o in out],
            "layer": type(layer).__name__,
            "runner": type(worker.model_runner).__module__,
            "mode": str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode),
        }


def apart(run: dict[str, Any], other: list[list[int]]) -> list[tuple[int, int, float]]:
    """Where `other` first leaves the texts of `run` by more than a tie: (text, position, lead in nats)."""
    found = []
    for r, (a, b) in enumerate(zip(run["tokens"], other)):
        at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if at is not None:
            seen = run["logprobs"][r][at]
            lead = seen[a[at]].logprob - seen[b[at]].logprob if b[at] in seen else float("inf")
            found += [(r, at, lead)] if lead > TIE else []
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE with 16 experts, 4 a token, in 4 layers, whose logits are far apart."""
    from vllm_ext.moe.models import tiny_moe

    folder = tmp_path_factory.mktemp("moe") / "qwen3_moe"
    tiny_moe(folder, "qwen3_moe", experts=16, top_k=4, width=128, layers=4, vocab=256, dtype="bfloat16", heads=8)
    return far_apart(folder, 16)


@pytest.fixture(scope="module")
def stock(model: Path) -> dict[str, Any]:
    return run(model, None)


def test_a_trace_keeps_stock_tokens(model: Path, stock: dict[str, Any], tmp_path: Path) -> None:
    """The same kernels on the same batches: equal but for what the reversed batch also changes in stock."""
    path = tmp_path / "trace.safetensors"
    traced = run(model, {"moe_trace": {"path": str(path)}})
    assert (stock["layer"], traced["layer"]) == ("MoERunner", "Runner")
    assert traced["tokens"] == stock["tokens"]


def test_graphs_route_and_trace_as_eager_does(model: Path, stock: dict[str, Any], tmp_path: Path) -> None:
    """A router plugin under FULL and PIECEWISE graphs on model runner V2 gives eager's tokens, up to ties.

    The trace is what vLLM itself returns as routed experts.
    """
    from vllm_ext.moe import trace_file

    path = tmp_path / "trace.safetensors"
    plugins = {"kern": {"gamma": 2.0}, "moe_trace": {"path": str(path)}}
    eager = run(model, plugins, enable_prefix_caching=True)
    path.unlink()
    graphs = run(model, plugins, enforce_eager=False, enable_return_routed_experts=True, enable_prefix_caching=True)
    assert graphs["runner"].startswith("vllm.v1.worker.gpu.")
    assert "FULL" in graphs["mode"]
    assert eager["tokens"] != stock["tokens"]
    assert not apart(graphs, eager["tokens"])
    assert not apart(graphs, graphs["reversed"])
    requests = trace_file.load(path).requests
    for rows, routed in zip(requests, graphs["routed"]):
        want = np.sort(np.asarray(routed).reshape(-1, *rows.shape[1:]).astype(np.int64))
        got = np.sort(np.where(rows == 255, 0, rows).astype(np.int64))[: len(want)]
        assert len(want) > 0
        assert np.array_equal(got, want)


def test_rounding_and_dirmoe_serve(model: Path, stock: dict[str, Any]) -> None:
    """Large batches are rounded, small ones are stock; DirMoE's threshold leaves columns empty."""
    rounded = run(model, {"token_rounding": {"tile": 16, "fill": 1.0}})
    assert rounded["tokens"] != stock["tokens"]
    sparse = run(model, {"dirmoe": {"threshold": 0.9}})
    assert sparse["tokens"] != stock["tokens"]


def test_routers_run_on_the_sonic_kernels(model: Path) -> None:
    """With columns left out by the kernel and with columns of weight 0 in vLLM's: the same tokens up to ties."""
    routers: dict[str, dict[str, Any]] = {"dirmoe": {"threshold": 0.6}}
    vllms = run(model, routers)
    sonic = run(model, routers | {"sonic_moe": {"calls": "all"}})
    assert not apart(vllms, sonic["tokens"])


@pytest.mark.parametrize("method", ["nash", "camex", "mean", "drop"])
def test_merging_on_the_device_is_merging(method: str, tmp_path: Path) -> None:
    """The same clusters, neurons and experts as on a CPU, up to rounding."""
    from vllm_ext.moe.checkpoint import Checkpoint
    from vllm_ext.moe.merge import Plan, merge_checkpoint
    from vllm_ext.moe.models import tiny_moe

    source = tiny_moe(tmp_path / "source")
    for device in ("cpu", "cuda"):
        merge_checkpoint(source, tmp_path / device, Plan(4, method), device=device)
    for layer in (0, 1):
        found, want = (Checkpoint(tmp_path / device).experts(layer) for device in ("cuda", "cpu"))
        for part in ("router", "gate", "up", "down"):
            assert torch.allclose(getattr(found, part), getattr(want, part), atol=1e-5), part
