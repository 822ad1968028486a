"""A real model on a CPU: SmolLM2-135M in fp32, stock against plugins; mixed lengths, chunked prefill, prefix hits."""

from __future__ import annotations

import random
from typing import Any

import pytest
from engines import BASE, counters, generate, leaked, outputs, start

pytestmark = pytest.mark.engine

PAGE = 32
LENGTHS = (5, 31, 32, 33, 64, 129, 290, 899)
OUTPUT = 64
COVERING = {"page_size": PAGE, "budget": 1024, "dense_below": 0}
SPARSE = {"page_size": PAGE, "budget": 128, "dense_below": 0}
ENGINE = BASE | {"max_num_batched_tokens": 192, "num_gpu_blocks_override": 160}


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> str:
    """Directory of SmolLM2 in fp32."""
    from pathlib import Path

    from vllm_ext.models import smollm2

    gguf = request.config.getoption("--gguf")
    return str(smollm2(dtype="float32", gguf=Path(gguf) if gguf else None))


@pytest.fixture(scope="module")
def prompts(model: str) -> list[list[int]]:
    """Real prose of LENGTHS tokens."""
    from transformers import AutoTokenizer

    from vllm_ext.evaluation import corpus

    tokenizer, words, rnd = AutoTokenizer.from_pretrained(model), corpus.load().split(), random.Random(0)
    texts = [" ".join(words[(at := rnd.randrange(0, 9000)) : at + n]) for n in LENGTHS]
    return [tokenizer.encode(t)[:n] for t, n in zip(texts, LENGTHS)]


@pytest.fixture(scope="module")
def stock(model: str, prompts: list[list[int]]) -> list[list[int]]:
    """Tokens of stock vLLM."""
    with start(model, None, **ENGINE) as llm:
        return generate(llm, prompts, OUTPUT)


def both_rounds(model: str, plugin: dict[str, dict[str, Any]], prompts: list[list[int]], n: int) -> dict[str, Any]:
    """Tokens of a first run and of a second one in another order, which finds the prompts in the prefix cache."""
    with start(model, plugin, **ENGINE) as llm:
        first = generate(llm, prompts, n)
        after_first = counters(llm)
        again = outputs(llm, prompts[::-1], n)[::-1]
        return {
            "first": first,
            "again": [list(o.outputs[0].token_ids) for o in again],
            "cached": [o.num_cached_tokens for o in again],
            "stats": after_first,
            "leaked": leaked(llm),
        }


def test_prompts_have_the_lengths(prompts: list[list[int]]) -> None:
    assert tuple(map(len, prompts)) == LENGTHS


def test_quest_with_room_for_all_pages_is_stock(model, prompts, stock) -> None:
    run = both_rounds(model, {"quest": COVERING}, prompts, OUTPUT)
    assert run["first"] == stock
    assert run["again"] == stock
    assert run["cached"] == [(n - 1) // PAGE * PAGE for n in LENGTHS]
    assert run["stats"]["sparse_steps"] == len(LENGTHS) * (OUTPUT - 1)
    assert run["stats"]["dense_steps"] == 0
    assert run["stats"]["keys_read"] == run["stats"]["keys_visible"] > 0
    assert run["leaked"] == 0


def test_prefix_hits_of_sparse_runs(model, prompts, stock) -> None:
    """A truly sparse budget: a hit equals the first run, also where 1 to 3 prompt tokens are left to compute."""
    run = both_rounds(model, {"quest": SPARSE}, prompts, 24)
    assert run["again"] == run["first"]
    left = [n - c for n, c in zip(LENGTHS, run["cached"])]
    assert {1, 2, 3} <= set(left)
    short = [i for i, n in enumerate(LENGTHS) if n + 24 <= SPARSE["budget"]]
    assert [run["first"][i] for i in short] == [stock[i][:24] for i in short]
    density = run["stats"]["keys_read"] / run["stats"]["keys_visible"]
    assert 0.3 < density < 0.6
    assert [t[0] for t in run["first"]] == [t[0] for t in stock]  # prefill is exact


@pytest.mark.parametrize("name", ["oracle_topk", "streaming"])
def test_other_methods_with_room_for_all_pages(model, prompts, stock, name: str) -> None:
    with start(model, {name: COVERING}, **ENGINE) as llm:
        assert generate(llm, prompts, 12) == [t[:12] for t in stock]
        assert counters(llm)["sparse_steps"] == len(LENGTHS) * 11
