"""MoE plugins in real CPU engines: lossless ones give stock tokens, routers are in effect, and traces are true."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_ext.moe import trace_file

pytestmark = pytest.mark.engine

FAMILIES = ("mixtral", "qwen3_moe", "olmoe")


def prompts(count: int = 5, seed: int = 0) -> list[list[int]]:
    """Random prompts of 7 to 60 tokens."""
    rnd = random.Random(seed)
    return [[rnd.randrange(256) for _ in range(rnd.randrange(7, 60))] for _ in range(count)]


def layers(llm: Any) -> list[Any]:
    """The MoE layers of the model."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return [m for m in worker.get_model().modules() if hasattr(m, "routed_experts")]


def shut_down(llm: Any) -> None:
    """What a server does when it ends."""
    llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.shutdown()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_changes_no_token_and_is_what_the_router_chose(
    family: str, tiny_moe: Callable, start: Callable, generate: Callable, tmp_path: Path
) -> None:
    """Stock tokens; the rows of a prompt equal what a stock engine's routers chose, whatever the chunks were."""
    model, prompt = tiny_moe(family), prompts(1, seed=3)[0]
    seen: dict[int, Any] = {}
    with start(model) as llm:
        stock = generate(llm, prompts(), 12)
        assert type(layers(llm)[0]).__name__ == "MoERunner"
        for i, layer in enumerate(layers(llm)):
            layer.router.set_capture_fn(lambda ids, i=i: seen.setdefault(i, ids.clone().numpy()))
        generate(llm, [prompt], 1)
    path = tmp_path / "trace.safetensors"
    with start(model, {"moe_trace": {"path": str(path)}}, max_num_batched_tokens=16) as llm:
        assert generate(llm, prompts(), 12) == stock
        generate(llm, [prompt], 1)
        shut_down(llm)
    trace = trace_file.load(path)
    assert (trace.num_experts, trace.top_k, trace.layers) == (8, 2, (0, 1))
    assert trace.prompt.tolist() == [len(p) for p in [*prompts(), prompt]]
    # the last token of an output is never computed
    assert np.diff(trace.offsets).tolist() == [*(len(p) + 11 for p in prompts()), len(prompt)]
    for layer in range(2):
        assert np.array_equal(np.sort(trace.requests[-1][:, layer]), np.sort(seen[layer]))


def test_a_trace_is_sampled_and_bounded(
    tiny_moe: Callable, start: Callable, generate: Callable, tmp_path: Path
) -> None:
    model, path = tiny_moe("mixtral"), tmp_path / "trace.safetensors"
    with start(model, {"moe_trace": {"path": str(path), "max_tokens": 90}}) as llm:
        generate(llm, prompts(), 12)
        shut_down(llm)
    assert len(trace_file.load(path).experts) == 90
    path.unlink()
    with start(model, {"moe_trace": {"path": str(path), "share": 0.0}}) as llm:
        generate(llm, prompts(), 4)
        shut_down(llm)
    assert not path.exists()


def test_preempted_and_cached_requests_are_traced_once(
    tiny_moe: Callable, start: Callable, generate: Callable, tmp_path: Path
) -> None:
    """A pool too small for all requests: recomputed tokens replace themselves; cached ones are left out."""
    model, path = tiny_moe("mixtral"), tmp_path / "trace.safetensors"
    many = [p * 2 for p in prompts(6)]
    with start(model, {"moe_trace": {"path": str(path)}}, enable_prefix_caching=False) as llm:
        generate(llm, many, 40)
        shut_down(llm)
    whole = {tuple(p): r for p, r in zip(map(tuple, many), trace_file.load(path).requests)}
    small = {"num_gpu_blocks_override": 4, "block_size": 128, "enable_prefix_caching": True, "max_model_len": 256}
    with start(model, {"moe_trace": {"path": str(path)}}, **small) as llm:
        generate(llm, many, 40)
        generate(llm, [many[0]], 4)
        shut_down(llm)
    trace = trace_file.load(path)
    for prompt, first, rows in zip([*many, many[0]], trace.first, trace.requests):
        want = whole[tuple(prompt)][first : first + len(rows)]
        assert np.array_equal(np.sort(rows), np.sort(want)[: len(rows)])


def first_layers(model: Path, out: Path, count: int) -> Path:
    """A model of the first `count` layers of another, so that three engines of it take seconds."""
    from safetensors.torch import load_file, save_file

    def kept(name: str) -> bool:
        return not name.startswith("model.layers.") or int(name.split(".")[2]) < count

    out.mkdir()
    for path in model.glob("*.safetensors"):
        save_file({k: w for k, w in load_file(path).items() if kept(k)}, out / path.name)
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    return out


def test_routers_that_sum_to_one_leave_an_upcycled_model_unchanged(
    smollm2_dir: str, start: Callable, generate: Callable, tmp_path: Path
) -> None:
    """Experts that are copies make the routed output a weighted mean of equal terms: the dense model's tokens."""
    from vllm_ext.moe.models import upcycle

    few = first_layers(Path(smollm2_dir), tmp_path / "few", 6)
    model = upcycle(few, tmp_path / "moe", experts=4)
    text = [[2504, 253, 655, 28, 665, 436, 253, 3817, 1095, 282], [504, 3575, 282, 4649, 314, 260]]
    with start(few) as llm:
        dense = generate(llm, text, 12)
    for plugins in (None, {"dirmoe": {"threshold": 0.5, "tau": 0.1}}):
        with start(model, plugins) as llm:
            assert generate(llm, text, 12) == dense, plugins


def test_a_router_is_in_effect_and_computes_its_formula(
    tiny_moe: Callable, start: Callable, generate: Callable
) -> None:
    """Layer output with KERN equals a loop over experts with the formula's weights (R0)."""
    import torch

    model = tiny_moe("qwen3_moe")
    with start(model) as llm:
        stock = generate(llm, prompts(), 12)
    with start(model, {"kern": {"gamma": 2.0}}) as llm:
        assert generate(llm, prompts(), 12) != stock
        router = layers(llm)[0].router
        assert type(router).__name__ == "Router"
        logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        weights, ids = router.select_experts(torch.zeros(64, 64), logits, torch.int32)
        want = 2 * logits.clamp(min=0).double() / (logits.double().norm(dim=-1, keepdim=True) + 1e-6)
        assert torch.allclose(weights.double(), want.topk(2).values, atol=1e-6)
        assert ids.min() >= 0  # the CPU kernel cannot skip, so it gets valid ids with weight 0
        captured = []
        router.set_capture_fn(captured.append)  # what --enable-return-routed-experts hangs on a router
        assert torch.equal(router.select_experts(torch.zeros(64, 64), logits, torch.int32)[1], captured[0])


def test_rounding_leaves_small_batches_alone(tiny_moe: Callable, start: Callable, generate: Callable) -> None:
    """Below two tiles an expert, stock tokens; with tiles of 16 a prompt of 200 tokens is rounded."""
    model, long = tiny_moe("mixtral"), [[(7 * i * i + i) % 256 for i in range(200)]]
    with start(model) as llm:
        stock = [generate(llm, p, 8) for p in (prompts(), long)]
    with start(model, {"token_rounding": {}}) as llm:
        assert [generate(llm, p, 8) for p in (prompts(), long)] == stock
    with start(model, {"token_rounding": {"tile": 16}}) as llm:
        assert generate(llm, long, 8) != stock[1]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"use_grouped_topk": True}, "grouped experts"),
        ({"e_score_correction_bias": 1}, "correction bias"),
        ({"custom_routing_function": print}, "routing function"),
        ({"routed_scaling_factor": 2.5}, "scaled routed output"),
        ({"scoring_func": "sigmoid"}, "the sigmoid scores"),
        ({"moe_config": SimpleNamespace(has_hash_routing=True)}, "by token id"),
    ],
)
def test_a_layer_that_routes_otherwise_is_refused(change: dict[str, Any], word: str) -> None:
    """The last check before weights load; what a config does not tell shows in the layer."""
    from vllm_ext.moe.kern import Kern
    from vllm_ext.moe.layers import _check_kernel, _check_router
    from vllm_ext.moe.trace import MoETrace
    from vllm_ext.options import ConfigError

    plain = {"use_grouped_topk": False, "e_score_correction_bias": None, "custom_routing_function": None}
    plain |= {"routed_scaling_factor": 1.0, "scoring_func": "softmax"}
    plain["moe_config"] = SimpleNamespace(has_hash_routing=False)
    _check_router(Kern(), None, SimpleNamespace(**plain))
    with pytest.raises(ConfigError, match=word):
        _check_router(Kern(), None, SimpleNamespace(**plain | change))
    _check_kernel([Kern(), MoETrace()], SimpleNamespace(is_monolithic=False))
    for plugin in (Kern(), MoETrace()):
        with pytest.raises(ConfigError, match="--moe-backend triton"):
            _check_kernel([plugin], SimpleNamespace(is_monolithic=True))


@pytest.mark.parametrize(
    ("plugins", "word"),
    [({"kern": {}}, "mixture-of-experts"), ({"moe_trace": {}}, "mixture-of-experts")],
)
def test_a_dense_model_is_refused(plugins: dict, word: str, tmp_path: Path, start: Callable) -> None:
    from vllm_ext.models import tiny_llama
    from vllm_ext.options import ConfigError

    with pytest.raises(ConfigError, match=word), start(tiny_llama(tmp_path / "dense"), plugins):
        pass
