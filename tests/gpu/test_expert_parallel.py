"""Two GPUs that share the experts out and balance their load, against one GPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clear_routers import far_apart
from fixed_cache import FIXED_CACHE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

LENGTHS = (40, 300, 700)
OUTPUT = 40
EXPERTS = 8
TIE = 0.1
"""Nats: other orders of summation round differently in bfloat16."""
FILLING: dict[str, Any] = {"dirmoe": {"threshold": 0.5}}
SKIPPING = FILLING | {"sonic_moe": {"calls": "all"}}
BALANCED = {
    "tensor_parallel_size": 2,
    "enable_expert_parallel": True,
    "disable_custom_all_reduce": True,
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


def prompts_of(file: Path) -> tuple[list[int], np.ndarray]:
    """Prompt lengths of a trace, ascending, and its prompts' rows in that order: [T, L, W] ids, ascending."""
    from vllm_ext.moe import trace_file

    trace = trace_file.load(file)
    order = np.argsort(trace.prompt)
    rows = np.concatenate([trace.requests[i][: trace.prompt[i]] for i in order])
    return trace.prompt[order].tolist(), np.sort(rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE with clear routing: to two experts for half of the tokens, to one for the others."""
    from vllm_ext.moe.models import tiny_moe

    folder = tmp_path_factory.mktemp("experts") / "moe"
    shape = {"vocab": 256, "hidden": 512, "width": 128, "head_dim": 64}
    tiny_moe(folder, "qwen3_moe", experts=EXPERTS, heads=8, dtype="bfloat16", **shape)
    return far_apart(folder, EXPERTS, single=True)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """Outputs and trace of one GPU with vLLM's own experts."""
    trace = tmp_path_factory.mktemp("alone") / "trace"
    return run(model, FILLING, trace), trace


@pytest.mark.parametrize("plugins", [SKIPPING, FILLING], ids=["sonic_moe", "stock-experts"])
def test_shared_out_experts_give_the_tokens_of_one_gpu(
    plugins: dict[str, Any],
    model: Path,
    alone: tuple[list[Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trace holds the logical experts that one GPU chooses, wherever their copies are."""
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_FLASHINFER", "0")  # another sum than NCCL's, compiled for a minute
    found = run(model, plugins, tmp_path / "trace", **BALANCED)
    assert apart(alone[0], found) == []
    (lengths, want), (same, rows) = prompts_of(alone[1]), prompts_of(tmp_path / "trace")
    assert lengths == same == list(LENGTHS)
    assert np.array_equal(rows, want)
    assert 0.2 < (rows[..., -1] >= EXPERTS).mean() < 0.8  # the second column of tokens with one expert
