"""The judge of free generation on a GPU: under plugins it equals the stock engine's, and counters are of the task."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fixed_cache import FIXED_CACHE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LENGTH, OUTPUT, TEXTS = 1500, 100, 6
ROWS = {
    "quest": {"budget": 256, "page_size": 16, "dense_below": 0},
    "snapkv": {"ratio": 0.2},
}


def run(model: str, plugin: str | None) -> dict[str, Any]:
    """Log-probabilities of fixed texts by the judge, and of drawn texts by decode steps and judge, chunked prompts."""
    import vllm_ext
    from vllm_ext.evaluation import corpus
    from vllm_ext.evaluation.engine import engine
    from vllm_ext.evaluation.generation import draw, prompt_logprobs
    from vllm_ext.evaluation.reads import Meter

    args = {
        "max_model_len": 2048, "max_num_seqs": 16, "max_num_batched_tokens": 1024, "enforce_eager": True, "seed": 0,
        **FIXED_CACHE,
    } | (vllm_ext.engine_args(plugin, **{plugin: ROWS[plugin]}) if plugin else {})  # fmt: skip
    with engine(model, args) as llm:
        texts = corpus.windows(llm.get_tokenizer(), TEXTS, LENGTH)
        meter = Meter(llm)
        drawn = draw(llm, texts, OUTPUT)
        read = meter.cell()
        judged = prompt_logprobs(llm, [t + d for t, (d, _) in zip(texts, drawn)])
        return {
            "fixed": np.stack([x[1:] for x in prompt_logprobs(llm, texts)]),
            "kl": float(np.mean([own - x[LENGTH:] for (_, own), x in zip(drawn, judged)])),
            **read,
        }


@pytest.fixture(scope="module")
def stock(smollm2_dir: str) -> dict[str, Any]:
    return run(smollm2_dir, None)


@pytest.mark.parametrize("plugin", ROWS)
def test_judge_is_full_attention(smollm2_dir: str, stock: dict[str, Any], plugin: str) -> None:
    found = run(smollm2_dir, plugin)
    assert np.abs(found["fixed"] - stock["fixed"]).mean() < 0.02  # bfloat16
    assert abs(stock["kl"]) < 0.02 < found["kl"]
    assert "read" not in stock
    if plugin == "quest":
        read, steps = found["read"], TEXTS * (OUTPUT - 1)
        served = read["sparse_steps"] + read["dense_steps"]
        assert steps <= served <= 1.05 * steps  # a step behind the last may have begun
        assert 0.14 < read["density"] < 0.18
        assert read["density"] < read["bytes_sparse_layers"] < read["density"] + 0.07
