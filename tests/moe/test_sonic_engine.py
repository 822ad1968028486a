"""sonic_moe in a real CPU engine, where it is the kernels' specification: stock tokens, and room for skipped pairs."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.engine


def test_stock_tokens(tiny_moe: Callable, start: Callable, generate: Callable) -> None:
    """Same greedy tokens, alone and behind a router that leaves pairs out."""
    rnd = random.Random(0)
    prompts = [[rnd.randrange(256) for _ in range(n)] for n in (7, 30, 55)]
    model = tiny_moe("qwen3_moe")
    routers = {"dirmoe": {}}
    with start(model) as llm:
        stock = generate(llm, prompts, 16)
    with start(model, routers) as llm:
        routed = generate(llm, prompts, 16)
    with start(model, {"sonic_moe": {}}) as llm:
        assert generate(llm, prompts, 16) == stock
        assert generate(llm, prompts[::-1], 16) == stock[::-1]
    with start(model, routers | {"sonic_moe": {}}) as llm:
        assert generate(llm, prompts, 16) == routed
