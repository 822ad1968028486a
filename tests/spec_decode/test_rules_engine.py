"""Verification rules in real engines on a CPU, both model runners: greedy requests write what they do undrafted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from noisy_model import noisy_copy
from rule_engines import start

OUTPUT = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vllm_ext.models import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("models") / "target", layers=2)


@pytest.fixture(scope="module")
def draft(model: Path) -> Path:
    """The target with some noise on its weights: a drafter that is right now and then."""
    return noisy_copy(model)


@pytest.fixture(scope="module")
def stock(model: Path) -> Callable[[str], Any]:
    """Runner -> answers without speculation, once a runner."""
    return functools.cache(lambda runner: start(runner, model, {}, OUTPUT)["tokens"])


def check(found: dict[str, Any], runner: str, stock: list[list[int]] | None) -> None:
    """Greedy requests answer as `stock` does, where it is given."""
    assert found["sampler"] == f"vllm_ext.spec_decode.verify_{runner}"
    assert found["runner"].endswith("_model_runner") == (runner == "v1")  # V2: worker.cpu.model_runner
    assert found["num_draft_tokens"] > 0
    assert all(len(t) == OUTPUT for t in found["tokens"])
    for i in (0, 2, 4):
        assert stock is None or found["tokens"][i] == stock[i]


@pytest.mark.engine
@pytest.mark.parametrize("rule", ["hsd", "fly"])
def test_lookup_drafts_on_v1(model: Path, stock: Callable[[str], Any], rule: str) -> None:
    """FLy with the largest threshold forgives nothing. A random model repeats nothing, so drafts are rejected here."""
    options = {"theta": 1.0, "window": 2} if rule == "fly" else {}
    plugins = {"suffix_automaton": {"num_speculative_tokens": 4}, rule: options}
    check(start("v1", model, plugins, OUTPUT), "v1", stock("v1"))


@pytest.mark.engine
@pytest.mark.parametrize("rule", ["hsd", "cactus"])
def test_sampled_drafts_on_v2(model: Path, draft: Path, stock: Callable[[str], Any], rule: str) -> None:
    drafter = {"model": str(draft), "num_speculative_tokens": 3, "sampling": "probabilistic"}
    found = start("v2", model, {"draft_model": drafter, rule: {}}, OUTPUT)
    check(found, "v2", stock("v2"))
    assert 0 < found["num_accepted_tokens"] < found["num_draft_tokens"]


@pytest.mark.engine
def test_fly_without_a_threshold_keeps_everything_on_v2(model: Path, draft: Path) -> None:
    drafter = {"model": str(draft), "num_speculative_tokens": 4}
    found = start("v2", model, {"draft_model": drafter, "fly": {"theta": 0.0, "window": 0}}, OUTPUT)
    check(found, "v2", None)
    assert found["num_accepted_tokens"] >= 0.9 * found["num_draft_tokens"]  # all but the last step of a request
