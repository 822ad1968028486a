"""The whole evaluation on a tiny random model: dense against dense, record, table, plot."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from byte_tokenizer import byte_tokenizer

from vllm_ext.cli import main
from vllm_ext.models import tiny_llama


@pytest.fixture
def model(tmp_path):
    folder = tiny_llama(tmp_path / "model")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.engine
@pytest.mark.parametrize("extra", [["--in-process", "--decode-question"], []])
def test_dense_against_dense(model, tmp_path, monkeypatch, capsys, extra):
    """In one process, and in a fresh one for each row."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    out = tmp_path / "out"
    command = ["vllm-ext", "eval", str(model), "--plugins", "dense", "--length", "700", "--samples", "3"]
    command += ["--positions", "9", "--texts", "3", "--batch", "2", "--eager", "--dtype", "float32", "--out", str(out)]
    command += ["--task", "niah", "--task", "kl", "--task", "ppl", "--task", "gen", "--output", "20"]
    command += ["--plugins", "quest:budget=256,dense_below=0", "--commit", "test", *extra]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    record = json.loads((out / "eval.json").read_text())
    assert record["commit"] == "test"
    dense, control, sparse = record["results"]
    assert "kl" not in dense or not dense["kl"]
    cell = control["kl"][0]
    assert cell["mean"] < 1e-6
    assert cell["agree"] == 1.0
    assert cell["tokens"] == 27
    assert control["ppl"][0]["nll"] == pytest.approx(dense["ppl"][0]["nll"], abs=1e-6)
    assert abs(control["ppl"][0]["nll_more"]) < 1e-6
    assert dense["niah"][0]["samples"] == 3
    answers = [[a["generated"] for a in r["niah"][0]["answers"]] for r in (dense, control)]
    assert answers[0] == answers[1]
    assert control["gen"][0]["nll_more"] == pytest.approx(0, abs=1e-5)
    assert abs(control["gen"][0]["kl"]) < 1e-3 < abs(sparse["gen"][0]["kl"])
    assert control["gen"][0]["tokens"] == 60
    assert "read" not in control["gen"][0]
    steps = {task: sparse[task][0]["read"]["sparse_steps"] for task in ("niah", "kl", "ppl", "gen")}
    questions = steps.pop("niah")
    assert questions >= 3 * 11
    assert steps == {"kl": 27, "ppl": 27, "gen": 3 * 19}
    densities = {task: sparse[task][0]["read"]["density"] for task in ("niah", "kl", "gen")}
    assert all(0.25 < x < 0.45 for x in densities.values()), densities
    assert (out / "eval.png").stat().st_size > 5000
    shown = capsys.readouterr().out
    assert "perplexity" in shown
    assert "bytes, all layers" in shown
