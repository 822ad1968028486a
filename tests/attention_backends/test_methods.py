"""Every attention method in a real CPU engine: short requests equal stock, prefix hits, preemption, counters, leaks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from engines import PAGE, counters, generate, leaked, outputs, start, tokens, wrong_records
from learned import gates, roles

from vllm_ext import catalogue

pytestmark = pytest.mark.engine

SHORT, LONG = (5, 31, 32, 33, 64, 100, 130), (300, 500)
OUTPUT = 24
BASE = {"page_size": PAGE, "budget": 5 * PAGE, "dense_below": 0, "dense_layers": [1]}
ENGINE = {"num_gpu_blocks_override": 60}
# Options beside BASE; seer and lychee need files of the tiny model's shape. A further row has a word behind the name.
METHODS: dict[str, dict[str, Any]] = {
    "quest": {},
    "oracle_topk": {},
    "streaming": {},
    "vattention": {"epsilon": 0.2},
    "tactic": {"mass": 0.6, "dense_below": 5 * PAGE},
    "tactic kmeans": {"mass": 0.6, "dense_below": 5 * PAGE, "centroids": "kmeans"},
    "resa": {},
    "infllm_v2": {"local": 2},
    "retro": {},
    "seer": {"gates": gates(3, 2, 2, 32, 32, PAGE)},
    "lychee": {"roles": roles(3, 2, 2, 32), "sink": 1, "local": 2},
    "lychee recent": {"roles": roles(3, 2, 2, 32), "sink": 1, "local": 2, "others": "recent"},
}
IMPURE = ("resa",)
"""Methods whose answer may differ after a prefix hit; their classes say why."""


def test_every_method_has_a_row() -> None:
    assert {n.split()[0] for n in METHODS} == {n for n, p in catalogue.load().items() if p.kind == "attention"}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rnd = random.Random(0)
    return [tokens(rnd, n) for n in (*SHORT, *LONG)]


@pytest.fixture(scope="module")
def stock(tiny_model: Path, prompts: list[list[int]]) -> list[list[int]]:
    with start(tiny_model, None, **ENGINE) as llm:
        return generate(llm, prompts, OUTPUT)


@pytest.mark.parametrize("name", METHODS)
def test_method(tiny_model: Path, prompts: list[list[int]], stock: list[list[int]], name: str) -> None:
    rnd, short = random.Random(1), len(SHORT)
    with start(tiny_model, {name.split()[0]: BASE | METHODS[name]}, **ENGINE) as llm:
        first = generate(llm, prompts, OUTPUT)
        stats = counters(llm)
        again = outputs(llm, prompts[::-1], OUTPUT)[::-1]
        crowd = generate(llm, [*prompts[:short], *(tokens(rnd, 290) for _ in range(12))], OUTPUT)
        assert leaked(llm) == 0
        if name.startswith("tactic"):  # after prefix hits, preemption and reuse of pages
            wrong, compared = wrong_records(llm)
            assert wrong == []
            assert compared > 40
    assert first[:short] == stock[:short]
    assert [t[0] for t in first] == [t[0] for t in stock]  # prompts are exact
    assert [list(o.outputs[0].token_ids) for o in again[:short]] == stock[:short]
    assert [o.num_cached_tokens for o in again] == [(len(p) - 1) // PAGE * PAGE for p in prompts]
    if name not in IMPURE:
        assert [list(o.outputs[0].token_ids) for o in again] == first
    assert crowd[:short] == stock[:short]  # some were preempted on the way
    assert stats["sparse_steps"] + stats["dense_steps"] == len(prompts) * (OUTPUT - 1)
    assert stats["sparse_steps"] >= len(LONG) * (OUTPUT - 1)
    assert 0.15 < stats["keys_read"] / stats["keys_visible"] < 0.95
