"""Two GPUs against one: the ranks hold half of the KV heads each and choose their pages alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from fixed_cache import FIXED_CACHE
from learned import gates, roles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

LENGTHS = (40, 300, 900, 1700, 2500)
OUTPUT = 32
TIE = 0.1
SPARSE: dict[str, Any] = {"budget": 512, "dense_below": 0}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "stock": {},
    "quest": {"quest": SPARSE | {"dense_layers": [0]}},
    "seer": {"seer": SPARSE | {"gates": gates(4, 4, 2, 64, 64, 64)}},
    "lychee": {"lychee": SPARSE | {"roles": roles(4, 4, 2, 64)}},
}


def run(model: Path, plugins: dict[str, dict[str, Any]], ranks: int) -> list[Any]:
    """Greedy outputs with log-probabilities on `ranks` GPUs."""
    from vllm import SamplingParams

    import vllm_ext
    from vllm_ext.evaluation.engine import engine

    args = {
        "max_model_len": 4096, "max_num_seqs": 8, "max_num_batched_tokens": 1024,
        **FIXED_CACHE,
        "enforce_eager": True, "skip_tokenizer_init": True, "dtype": "float16", "tensor_parallel_size": ranks,
        "seed": 0, "disable_custom_all_reduce": True,  # ranks are tested here, not vLLM's sum
    } | (vllm_ext.engine_args(*plugins, **plugins) if plugins else {"block_size": 64})  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True, logprobs=5, detokenize=False)
    with engine(str(model), args) as llm:
        prompts = [{"prompt_token_ids": [3 + (i * i * 7 + n) % 500 for i in range(n)]} for n in LENGTHS]
        return llm.generate(prompts, params, use_tqdm=False)


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_give_the_tokens_of_one(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    from vllm_ext.models import tiny_llama

    model = tiny_llama(tmp_path_factory.mktemp("llama"), heads=8, kv_heads=4, dtype="float16")
    one, two = run(model, METHODS[name], 1), run(model, METHODS[name], 2)
    wrong = []
    for n, a, b in zip(LENGTHS, one, two):
        x, y = a.outputs[0], b.outputs[0]
        at = next((i for i, (s, t) in enumerate(zip(x.token_ids, y.token_ids)) if s != t), None)
        if at is None:
            continue
        seen = x.logprobs[at]
        if y.token_ids[at] not in seen or seen[x.token_ids[at]].logprob - seen[y.token_ids[at]].logprob > TIE:
            wrong.append((n, at, seen))
    assert not wrong
