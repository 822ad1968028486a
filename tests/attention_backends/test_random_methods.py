"""Random requests under every attention method, in a small pool: no leak, nothing unfinished, no wrong token.

Lists have room for every page, so each sparse step must equal dense attention. Aborts, preemptions, prefix hits, chunks
and mixed batches come from the workload of test_random_requests.py, which is longer and runs under Quest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import PAGE, core, counters, first_difference, generate, is_tie, leaked, start
from learned import roles
from test_methods import METHODS
from test_random_requests import Driver, Request, workload

pytestmark = pytest.mark.engine

REQUESTS, LONGEST = 30, 400
COVERING = {"page_size": PAGE, "budget": 512, "dense_below": 0, "dense_layers": [1]}
ENGINE = {"max_model_len": 512, "max_num_seqs": 12, "max_num_batched_tokens": 256}
POOL = 20
DENSE: dict[str, dict[str, Any]] = {
    "tactic": {"mass": 1.0, "dense_below": 64},
    "tactic kmeans": {"mass": 1.0, "dense_below": 64},
}
"""What makes a method dense beside a budget for every page."""
EXTRA = {"lychee retrieval": {"roles": roles(3, 2, 2, 32, 1), "sink": 1, "local": 2, "budget": 5 * PAGE}}
"""Every head a retrieval head: dense whatever the budget."""


def requests() -> list[Request]:
    """The first requests of the workload that are not too long, and a long one that is alone in the pool."""
    fitting = [r for r in workload(2) if len(r.prompt) <= LONGEST]
    return [*fitting[: REQUESTS - 1], Request(fitting[0].prompt[:1] * LONGEST, 60)]


@pytest.fixture(scope="module")
def dense(tiny_model: Path) -> list[list[int]]:
    with start(tiny_model, None, **ENGINE, num_gpu_blocks_override=300) as llm:
        return generate(llm, [r.prompt for r in requests()], [r.max_tokens for r in requests()])


@pytest.mark.parametrize("name", [*METHODS, *EXTRA])
def test_no_wrong_token(tiny_model: Path, dense: list[list[int]], name: str) -> None:
    asked = requests()
    own = EXTRA[name] if name in EXTRA else METHODS[name] | COVERING | DENSE.get(name, {})
    with start(tiny_model, {name.split()[0]: COVERING | own}, **ENGINE, num_gpu_blocks_override=POOL) as llm:
        driver = Driver(llm, asked, seed=3)
        driver.run(lambda step: None)
        stats = counters(llm)
        assert core(llm).scheduler.get_num_unfinished_requests() == leaked(llm) == 0
    assert driver.preemptions > 0
    assert sum(r.finished for r in asked) > 0.85 * REQUESTS
    assert stats["sparse_steps"] > 100
    assert name in EXTRA or stats["keys_read"] == stats["keys_visible"]
    wrong = [i for i, r in enumerate(asked) if r.got and first_difference(dense[i], r.got) is not None]
    if wrong:  # a tie of the dense model may fall either way
        with start(tiny_model, None, **ENGINE, num_gpu_blocks_override=300) as stock:
            wrong = [i for i in wrong if not is_tie(stock, asked[i].prompt, dense[i], asked[i].got)]
    assert not wrong
