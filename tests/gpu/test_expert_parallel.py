"""Two GPUs that share the experts out, with and without load balancing, against one GPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixed_cache import FIXED_CACHE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

LENGTHS = (40, 300, 700)
OUTPUT = 40
TIE = 0.5
"""Nats: other orders of summation round differently in bfloat16, and a token may then go to another expert."""
SKIPPING: dict[str, Any] = {"dirmoe": {"threshold": 0.5}, "sonic_moe": {"calls": "all"}}
FILLING: dict[str, Any] = {"dirmoe": {"threshold": 0.5}}
BALANCED = {
    "enable_eplb": True,
    # 8 steps of statistics, new places every 16: twice in a run of 40 steps
    "eplb_config": {"window_size": 8, "step_interval": 16, "num_redundant_experts": 2, "use_async": False},
}


def run(model: Path, plugins: dict[str, Any], trace: Path, **extra: Any) -> list[Any]:
    """Greedy outputs with log-probabilities; the routing goes to `trace`."""
    from vllm import SamplingParams

    import vllm_ext
    from vllm_ext.evaluation.engine import engine

    plugins = plugins | {"moe_trace": {"path": str(trace)}}
    args = {
        "max_model_len": 1024, "max_num_seqs": 8, "max_num_batched_tokens": 256, "dtype": "bfloat16", "seed": 0,
        "enforce_eager": True, "skip_tokenizer_init": True, **FIXED_CACHE,
    }  # fmt: skip
    rnd = random.Random(0)
    prompts = [{"prompt_token_ids": [rnd.randrange(3, 250) for _ in range(n)]} for n in LENGTHS]
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True, logprobs=5, detokenize=False)
    with engine(str(model), args | vllm_ext.engine_args(*plugins, **plugins) | extra) as llm:
        return llm.generate(prompts, params, use_tqdm=False)


def apart(one: list[Any], two: list[Any]) -> list[tuple[int, int, float]]:
    """Where texts first part by more than a tie: (text, position, lead in nats)."""
    found = []
    for number, (a, b) in enumerate(zip(one, two)):
        x, y = a.outputs[0], b.outputs[0]
        at = next((i for i, (s, t) in enumerate(zip(x.token_ids, y.token_ids)) if s != t), None)
        if at is None:
            continue
        seen = x.logprobs[at]
        lead = seen[x.token_ids[at]].logprob - seen[y.token_ids[at]].logprob if y.token_ids[at] in seen else 99.0
        found += [(number, at, lead)] if lead > TIE else []
    return found


@pytest.mark.parametrize("plugins", [SKIPPING, FILLING], ids=["sonic_moe", "stock-experts"])
def test_shared_out_experts_give_the_tokens_of_one_gpu(plugins: dict[str, Any], tmp_path: Path) -> None:
    """The trace holds logical experts, most of them those of one GPU, wherever their copies are."""
    from vllm_ext.moe import trace_file
    from vllm_ext.moe.models import tiny_moe

    shape = {"vocab": 256, "hidden": 512, "width": 128, "head_dim": 64}
    model = tiny_moe(tmp_path / "moe", "qwen3_moe", heads=8, dtype="bfloat16", **shape)
    ranks = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "disable_custom_all_reduce": True}
    cases = {"one": {}, "shared": ranks}
    cases["balanced"] = cases["shared"] | BALANCED
    runs = {name: run(model, plugins, tmp_path / name, **extra) for name, extra in cases.items()}
    traces = {name: trace_file.load(tmp_path / name) for name in cases}
    prompt = {
        name: np.sort(np.concatenate([r[:n] for r, n in zip(t.requests, t.prompt)])) for name, t in traces.items()
    }
    for name in ("shared", "balanced"):
        assert apart(runs["one"], runs[name]) == [], name
        assert traces[name].experts.max(where=traces[name].experts != traces[name].none, initial=0) < 8
        assert (prompt[name] == prompt["one"]).mean() > 0.9
