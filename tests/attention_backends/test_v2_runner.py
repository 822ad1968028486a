"""Model runner V2, the one that GPUs use, on a CPU: same tokens as stock V2, sparse steps, prefix hits, index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import COVERING, PAGE, SPARSE
from forked import call

pytestmark = pytest.mark.engine

LENGTHS, OUTPUT = (5, 31, 32, 33, 64, 200, 300), 12


@pytest.fixture(scope="module")
def run(tiny_model: Path) -> dict[str, Any]:
    """Everything in one process."""
    file = Path(__file__).with_name("v2_on_cpu.py")
    return call("v2", file, "run", str(tiny_model), COVERING, SPARSE, LENGTHS, OUTPUT)


def test_runs_under_the_new_runner(run: dict[str, Any]) -> None:
    assert {run[name]["runner"] for name in run} == {"vllm.v1.worker.cpu.model_runner"}


def test_room_for_all_pages_is_stock(run: dict[str, Any]) -> None:
    covering = run["covering"]
    assert covering["first"] == covering["again"] == run["stock"]["first"]
    assert covering["stats"]["sparse_steps"] == 2 * len(LENGTHS) * (OUTPUT - 1)
    assert covering["stats"]["keys_read"] == covering["stats"]["keys_visible"]


def test_sparse_lists_and_prefix_hits(run: dict[str, Any]) -> None:
    sparse = run["sparse"]
    assert sparse["first"] == sparse["again"]
    assert sparse["cached"] == [(n - 1) // PAGE * PAGE for n in LENGTHS]
    assert 0.3 < sparse["stats"]["keys_read"] / sparse["stats"]["keys_visible"] < 0.8
    assert [t[0] for t in sparse["first"]] == [t[0] for t in run["stock"]["first"]]


@pytest.mark.parametrize("name", ["covering", "sparse"])
def test_index_and_leaks(run: dict[str, Any], name: str) -> None:
    assert run[name]["wrong_records"] == []
    assert run[name]["leaked"] == 0
