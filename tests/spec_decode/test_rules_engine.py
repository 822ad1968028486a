"""Verification rules in real engines on a CPU, both model runners: greedy requests write what they do undrafted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from noisy_model import noisy_copy

OUTPUT = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vllm_ext.models import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("models") / "target", layers=2)


@pytest.fixture(scope="module")
def draft(model: Path) -> Path:
    """The target with some noise on its weights: a drafter that is right now and then."""
    return noisy_copy(model)


def run(runner: str, model: Path, plugins: dict[str, dict[str, Any]]) -> dict[str, Any]:
    job = {"runner": runner, "model": str(model), "plugins": plugins, "output": OUTPUT}
    script = Path(__file__).with_name("rule_engines.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), json.dumps(job)], capture_output=True, text=True, timeout=400, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT ")[1])


def check(found: dict[str, Any], runner: str, greedy: bool = True) -> None:
    assert found["sampler"] == f"vllm_ext.spec_decode.verify_{runner}"
    assert found["rule"]["runner"].endswith("_model_runner") == (runner == "v1")  # V2: worker.cpu.model_runner
    assert found["num_draft_tokens"] > 0
    assert all(len(t) == OUTPUT for t in found["rule"]["tokens"])
    if greedy:
        for i in (0, 2, 4):
            assert found["rule"]["tokens"][i] == found["stock"]["tokens"][i]


@pytest.mark.engine
@pytest.mark.parametrize("rule", ["hsd", "fly"])
def test_lookup_drafts_on_v1(model: Path, rule: str) -> None:
    """FLy with the largest threshold forgives nothing. A random model repeats nothing, so drafts are rejected here."""
    options = {"theta": 1.0, "window": 2} if rule == "fly" else {}
    check(run("v1", model, {"suffix_automaton": {"num_speculative_tokens": 4}, rule: options}), "v1")


@pytest.mark.engine
@pytest.mark.parametrize("rule", ["hsd", "cactus"])
def test_sampled_drafts_on_v2(model: Path, draft: Path, rule: str) -> None:
    drafter = {"model": str(draft), "num_speculative_tokens": 3, "sampling": "probabilistic"}
    found = run("v2", model, {"draft_model": drafter, rule: {}})
    check(found, "v2")
    assert 0 < found["num_accepted_tokens"] < found["num_draft_tokens"]


@pytest.mark.engine
def test_fly_without_a_threshold_keeps_everything_on_v2(model: Path, draft: Path) -> None:
    drafter = {"model": str(draft), "num_speculative_tokens": 4}
    found = run("v2", model, {"draft_model": drafter, "fly": {"theta": 0.0, "window": 0}})
    check(found, "v2", greedy=False)
    assert found["num_accepted_tokens"] >= 0.9 * found["num_draft_tokens"]  # all but the last step of a request
