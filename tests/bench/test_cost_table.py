"""`vllm-ext bench cost-table`: what it refuses, and a whole table of a tiny model that the policy then reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import forks

sys.path.insert(0, str(Path(__file__).parents[1] / "spec_decode"))
from rule_engines import start

Refused = Callable[[list[str], str], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vllm_ext.models import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=2)


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        (["--drafts", "2", "--drafts", "4"], "--drafts must hold 0"),
        (["--drafts", "0"], "--drafts must hold 0"),
        (["--drafts", "0", "--drafts", "16"], "suffix_automaton.num_speculative_tokens is 7"),
        (["--batch", "8", "--batch", "1"], "--batch must be different ascending numbers"),
        (["--context", "0"], "--context must be different ascending numbers"),
        (["--drafter", "suffix_automaten"], "did you mean 'suffix_automaton'"),
        (["--drafter", "quest"], "quest is no drafter"),
        (["--drafter", "suffix_automaton+hsd"], "names one drafter"),
    ],
)
def test_what_measures_nothing_is_refused(
    assert_refused: Refused, model: Path, tmp_path: Path, extra: list[str], word: str
) -> None:
    assert_refused(["bench", "cost-table", str(model), "--out", str(tmp_path / "t.json"), *extra], word)


def test_missing_models_are_refused(assert_refused: Refused, tmp_path: Path) -> None:
    assert_refused(["bench", "cost-table", str(tmp_path / "no"), "--out", str(tmp_path / "t.json")], "model directory")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA says")
def test_times_of_kernels_need_a_gpu(assert_refused: Refused) -> None:
    assert_refused(["bench", "verify"], "CUDA")


@pytest.mark.engine
def test_a_table_of_a_tiny_model_serves(model: Path, tmp_path: Path) -> None:
    """Measured, then decided by: with `cast` and `hsd` greedy requests write what they write without drafts."""
    from vllm_ext.spec_decode.draft_length import read_table

    out = tmp_path / "t.json"
    arguments = [
        "bench", "cost-table", str(model), "--out", str(out), "--batch", "1", "--batch", "3", "--drafts", "0",
        "--drafts", "2", "--context", "48", "--steps", "4", "--eager",
    ]  # fmt: skip
    done = forks().run(
        "import sys; sys.argv[0] = 'vllm-ext'\nfrom vllm_ext.cli import main; main()", *arguments,
        env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    table = read_table(str(out))
    assert table.seconds.shape == (1, 2, 2)
    assert (table.seconds < 10).all()
    [result] = json.loads(out.read_text())["results"]
    assert result["drafter"] == "suffix_automaton"
    drafted = np.asarray(result["drafted"])
    assert (drafted[..., 0] == 0).all()
    assert (drafted[..., 1] > 0).any()
    plugins = {
        "suffix_automaton": {"num_speculative_tokens": 2}, "hsd": {}, "cast": {"table": str(out), "lengths": [0, 2]}
    }  # fmt: skip
    found = start("v1", model, plugins, 24)
    stock = start("v1", model, {}, 24)
    assert found["sampler"] == "vllm_ext.spec_decode.verify_v1"
    for i in (0, 2, 4):
        assert found["tokens"][i] == stock["tokens"][i]
