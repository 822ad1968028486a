"""Model runner V2, the one that GPUs use, on a CPU: the same evictions and tokens as under V1, prefix hits, no leak."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from forked import call
from kv_engines import compactor, generate, start, tokens

pytestmark = pytest.mark.engine

LENGTHS, OUTPUT = [5, 64, 129, 200], 40
PLUGINS = {
    "snapkv": {"budget": 64, "window": 16},
    "snapkv full": {"ratio": 1.0},
    "r_kv": {"budget": 64, "stride": 32},
}


@pytest.fixture(scope="module")
def run(tiny_model: Path) -> dict[str, Any]:
    return call("v2", Path(__file__).with_name("kv_on_v2.py"), "run", str(tiny_model), PLUGINS, LENGTHS, OUTPUT)


def test_runs_under_the_new_runner(run: dict[str, Any]) -> None:
    assert {run[name]["runner"] for name in run} == {"vllm.v1.worker.cpu.model_runner"}
    assert run["snapkv full"]["first"] == run["stock"]["first"]


@pytest.mark.parametrize("name", ["snapkv", "r_kv"])
def test_evicts_as_the_old_runner_does(run: dict[str, Any], tiny_model: Path, name: str) -> None:
    rnd = random.Random(0)
    prompts = [tokens(rnd, n) for n in LENGTHS]
    with start(tiny_model, {name: PLUGINS[name]}, max_num_batched_tokens=128, max_num_seqs=8) as llm:
        assert run[name]["first"] == generate(llm, prompts, OUTPUT)
        assert run[name]["evictions"] == 2 * compactor(llm).totals.compactions
    assert run[name]["first"] == run[name]["again"]
    assert sum(run[name]["cached"]) > 0
    assert run[name]["freed"] > 0
    assert run[name]["leaked"] == 0
