"""`vllm-ext bench spec`: what it refuses, one run of a tiny model on a CPU, and the table of its record."""

from __future__ import annotations

import importlib.util
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import forks

from vllm_ext import results
from vllm_ext.bench import spec
from vllm_ext.bench.spec import SpecPlan, bench_spec, crossover, engine_args, parse_spec_row
from vllm_ext.evaluation import worker
from vllm_ext.options import ConfigError

Refused = Callable[[list[str], str], None]


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        (["--load", "poem"], "--load 'poem' does not exist"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--waves", "0"], "--waves must be at least 1"),
        (["--kv-memory", "0"], "--kv-memory must be above 0"),
        (["--resume"], "give it with --out"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--row", "suffix_automaten"], "did you mean 'suffix_automaton'"),
        pytest.param(
            ["--row", "vllm:suffix,num_speculative_tokens=4"],
            "needs the package arctic-inference",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("arctic_inference") is not None, reason="the package is installed"
            ),
        ),
    ],
)
def test_what_cannot_run_is_refused(assert_refused: Refused, tmp_path: Path, extra: list[str], word: str) -> None:
    assert_refused(["bench", "spec", str(tmp_path), *extra], word)


def test_vllms_own_methods_are_rows() -> None:
    row = parse_spec_row("vllm:draft_model,model=/m/draft,num_speculative_tokens=3")
    given = {"method": "draft_model", "model": "/m/draft", "num_speculative_tokens": 3}
    assert engine_args(row.label, row.options) == {"speculative_config": given}
    assert engine_args("none", parse_spec_row("none").options) == {}
    texts = ("none", row.label, "suffix_automaton:num_speculative_tokens=6+hsd", "suffix_automaton")
    assert [spec.drafts(parse_spec_row(text)) for text in texts] == [{0}, {3}, {6}, {7}]
    assert spec.drafts(parse_spec_row("suffix_automaton+fixed:drafts=3,lengths=[0,3]")) == {0, 3, 7}


@pytest.mark.parametrize("drafts", [(0,), (0, 7), (0, 4, 8)])
def test_every_row_captures_the_steps_of_all(drafts: tuple[int, ...]) -> None:
    plan = SpecPlan("m", batches=(1, 6, 32), drafts=drafts)
    sizes = plan.graph_sizes()
    assert sizes == sorted(set(sizes))
    assert {b * (k + 1) for b in (1, 6, 32) for k in drafts} <= set(sizes)
    assert max(b / a for a, b in itertools.pairwise(sizes)) <= 2.5  # little padding, also beside prompts
    assert sizes[-1] == 1280
    assert plan.settings()["graph_sizes"] == sizes
    assert SpecPlan("m", eager=True).settings()["graph_sizes"] == []


HASHES = """
import sys
from vllm_ext.bench import spec, spec_engine
from vllm_ext.evaluation.engine import prepare_process

prepare_process()
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

load_general_plugins()


def name(row, batches, sizes):
    "What vLLM caches the compiled model of a row under; without speculation if `row` is none."
    given = spec_engine.engine_args(batches, sizes, 0.1, False)
    given |= spec.engine_args(row, spec.parse_spec_row(row).options)
    given |= {"model": sys.argv[1], "skip_tokenizer_init": True, "max_model_len": 128}
    config = EngineArgs(**given).create_engine_config()
    alone = config.compute_hash()
    with spec_engine.one_compiled_model():
        shared = config.compute_hash()
    assert config.compute_hash() == alone
    return shared


draft = f"draft_model,model={sys.argv[1]},num_speculative_tokens=3"
rows = ["none", "suffix_automaton+hsd+fixed", "vllm:" + draft, draft.replace(",", ":", 1)]
same = {name(row, (1, 8), (1, 8 + i)) for i, row in enumerate(rows)}
other = {name("none", (1, 4), (1, 8)), name("streaming", (1, 8), (1, 8))}
print("RESULT", len(same), len(other), len(same & other))
"""


@pytest.mark.engine
def test_rows_share_one_compiled_model(tiny_model: Path) -> None:
    """Drafters, rules, lengths and graphs do not change its layers; the batch and an attention method may."""
    done = forks().run(HASHES, str(tiny_model), env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("RESULT")[1].split() == ["1", "2", "0"]


RUN = """
import sys
from vllm_ext.bench import spec, spec_loads
from vllm_ext.models import tiny_llama


class Ids:
    "A tokenizer of bytes: the loads' own texts, without their words."

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [5 + b % 200 for b in text.encode()[:90]]}


import transformers
transformers.AutoTokenizer.from_pretrained = lambda *a, **k: Ids()
plan = {"model": sys.argv[1], "loads": ["agent"], "batches": [2], "requests": 3, "output": 12, "repeats": 2}
job = {"plan": plan | {"eager": True, "max_model_len": 256, "kv_memory": 0.1}, "label": sys.argv[2]}
job["options"] = spec.parse_spec_row(sys.argv[2]).options
base = spec.engine_args
spec.engine_args = lambda *a: {"skip_tokenizer_init": True, "dtype": "float32"} | base(*a)
import json
print("RESULT " + json.dumps(spec.run_job(job)))
"""


@pytest.mark.engine
@pytest.mark.parametrize("row", ["suffix_automaton:num_speculative_tokens=4", "vllm:draft_model"])
def test_a_row_is_timed_and_counted(tiny_model: Path, row: str) -> None:
    """A tiny random model; as a draft model of itself it is always right, so all positions are accepted as often."""
    if row == "vllm:draft_model":
        row += f",model={tiny_model},num_speculative_tokens=3"
    done = forks().run(RUN, str(tiny_model), row, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("RESULT ")[1])
    [cell] = found["cells"]
    assert found["engine"]["model_runner"] == "v1"
    lengths = [len(answer) for answer in cell["answers"]]
    assert len(lengths) == 2 * 8  # repeats of four times the batch
    assert cell["output_tokens"] == sum(lengths)
    assert 6 <= min(lengths) < max(lengths) <= 12
    assert len(cell["seconds"]) == len(cell["rates"]) == 2
    assert found["skipped"] == []
    low, high = cell["tokens_per_s_range"]
    assert low <= cell["tokens_per_s"] <= high
    assert 0 < cell["draft_share"] < 1
    assert cell["accepted"] == pytest.approx(sum(cell["accepted_at"]) * cell["drafts"])
    assert cell["acceptance_length"] == pytest.approx(1 + sum(cell["accepted_at"]))
    assert cell["drafted"] > 0
    assert cell["drafted_per_step"] == pytest.approx(
        cell["drafted"] / max(cell["output_tokens"] - cell["accepted"], cell["drafts"])
    )
    if "draft_model" in row:
        assert cell["accepted"] > 0.7 * cell["drafted"]  # all but those of a request's last step
        assert len(cell["accepted_at"]) == 3
        assert 2 < cell["tokens_per_step"] <= 12


def cell(batch: int, speed: float, **more: object) -> dict[str, object]:
    """As much of a cell as its table shows."""
    base = {"load": "chat", "batch": batch, "tokens_per_s": speed, "tokens_per_s_range": [speed - 1, speed + 1]}
    return base | {"seconds": [1.0, 1.1], "ratio": speed / 100, "equal_answers": 1.0, "drafts": 0} | more


def speeds(*ratios: tuple[int, float]) -> list[dict[str, object]]:
    return [{"load": "chat", "batch": batch, "ratio": ratio} for batch, ratio in ratios]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (speeds((1, 1.4), (8, 1.1), (32, 1.01)), None),
        (speeds((1, 1.4), (8, 0.9), (32, 0.8)), 8),
        (speeds((32, 0.8), (1, 0.9), (8, 1.1)), 32),  # pays again at 8: batch 1 is no crossover
        (speeds((1, 0.9), (8, 0.9)), 1),
    ],
)
def test_the_crossover_is_where_a_row_is_slower_from_then_on(cells: list[dict], expected: int | None) -> None:
    assert crossover(cells) == {"chat": expected}


def timed(label: str, speed: float) -> dict[str, object]:
    """What a row's process returns: one cell of two answers, the second one its own."""
    answers = [[1, 2], [3, int(speed)]]
    cell = {"load": "chat", "batch": 1, "tokens_per_s": speed, "rates": [speed, speed / 2], "answers": answers}
    return {"label": label, "cells": [cell]}


def test_a_failing_row_stops_nothing_and_a_record_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    speed, ran = {"none": 100.0, "hybrid": 150.0, "ngram": 90.0}, []

    def run(target: str, job: dict, limit: float) -> dict:
        ran.append(job["label"])
        if job["label"] == "pard":
            raise ConfigError("row 'pard' took too long.")
        return timed(job["label"], speed[job["label"]])

    monkeypatch.setattr(worker, "fresh_process", run)
    saved: list[list[dict]] = []
    rows = [parse_spec_row(name) for name in ("none", "pard", "hybrid")]
    found = bench_spec(SpecPlan("m"), rows, lambda r: saved.append(json.loads(json.dumps(r))))
    assert [r["label"] for r in found] == [r["label"] for r in saved[2]] == ["none", "pard", "hybrid"]
    assert found[1]["failed"] == "row 'pard' took too long."
    assert found[2]["cells"][0]["ratio"] == 1.5
    assert found[2]["cells"][0]["ratio_range"] == [1.5, 1.5]
    assert found[2]["cells"][0]["equal_answers"] == 0.5
    assert "answers" not in found[2]["cells"][0]
    ran.clear()
    speed["pard"] = 120.0
    monkeypatch.setattr(worker, "fresh_process", lambda *a: ran.append(a[1]["label"]) or timed(ran[-1], speed[ran[-1]]))
    again = bench_spec(SpecPlan("m"), [*rows, parse_spec_row("ngram")], kept=saved[2])
    assert ran == ["pard", "ngram"]
    assert [r["label"] for r in again] == ["none", "hybrid", "pard", "ngram"]
    assert again[3]["crossover"] == {"chat": 1}
    assert again[3]["cells"][0]["equal_answers"] == 0.5


def test_nothing_is_kept_without_the_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "fresh_process", lambda target, job, limit: timed(job["label"], 100.0))
    kept = [{"label": "none", "failed": "no memory.", "cells": []}, {"label": "hybrid", "cells": []}]
    found = spec.bench_spec(SpecPlan("m"), [parse_spec_row("none"), parse_spec_row("hybrid")], kept=kept)
    assert all(len(r["cells"]) == 1 for r in found)


def test_what_does_not_fit_into_the_time_of_a_row_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeat that has begun ends; the first row's repeats of the same prompts are what it is compared with."""
    served: list[int] = []

    def serve(llm: object, asked: spec.Asked, batch: int) -> tuple[float, list[list[int]], int]:
        served.append(len(asked))
        return 0.5, [[1] * most for _, most in asked], 4

    class Clock:
        count, reset, seconds = 0, staticmethod(lambda: None), staticmethod(lambda: 0.0)

    monkeypatch.setattr(spec, "_serve", serve)
    monkeypatch.setattr(spec, "_counters", lambda llm: [0, 0])
    now = iter([10.0, 10.5, 11.5])
    monkeypatch.setattr(spec.time, "monotonic", lambda: next(now))
    asked = [[([1, 2], 3), ([4], 5)], [([1], 2)], [([1], 2)]]
    cell = spec._cell(None, "chat", 2, asked, Clock(), 11.0)
    assert served == [2, 1]
    assert (cell["prompt_tokens"], cell["output_tokens"], cell["rates"]) == (4, 10, [16.0, 4.0])
    now = iter([11.5])
    assert spec._cell(None, "chat", 2, asked, Clock(), 11.0) is None
    whole, part = timed("none", 100.0), timed("hybrid", 150.0)
    part["cells"][0] |= {"rates": [150.0], "answers": [[1, 2]]}
    spec._compare(whole, whole)
    spec._compare(part, whole)
    assert part["cells"][0]["ratio"] == 1.5
    assert part["cells"][0]["equal_answers"] == 1.0


def hang(job: dict) -> None:
    time.sleep(60)


def test_a_row_that_hangs_is_ended() -> None:
    with pytest.raises(ConfigError, match="row 'slow' took longer than 3 s"):
        worker.fresh_process(f"{__name__}:hang", {"label": "slow"}, 3)


def test_records_become_tables(tmp_path: Path) -> None:
    drafted = {
        "drafts": 10,
        "tokens_per_step": 1.5,
        "acceptance_length": 1.75,
        "accepted_at": [0.5, 0.25, 0.0],
        "draft_share": 0.031,
        "drafted_per_step": 0.25,
    }
    engine = {"model_runner": "v2"}
    rows = [
        {"label": "none", "engine": engine, "cells": [cell(1, 100.0), cell(8, 100.0)]},
        {
            "label": "ngram",
            "engine": engine,
            "cells": [cell(1, 150.0, **drafted), cell(8, 97.0, ratio_range=[0.9, 1.02], **drafted)],
            "crossover": {"chat": 8},
            "skipped": [["agent", 1], ["agent", 8]],
        },
        {"label": "vllm:suffix", "failed": "no such package.", "cells": []},
    ]
    settings = {"model": "/somewhere/tiny", "loads": ["chat"], "batches": [1, 8], "repeats": 2, "eager": False}
    versions = {"vllm": "0", "torch": "0", "triton": None}
    record = {"command": "bench spec", "device": "a device", "versions": versions, "argv": ["bench", "spec"]}
    (tmp_path / "spec.json").write_text(json.dumps(record | {"settings": settings, "results": rows}))
    times = {"context": [64], "batch": [1], "drafts": [0, 4], "seconds": [[[0.001, 0.0015]]]}
    times |= {"iqr": [[[[0.0009, 0.0011], [0.0014, 0.0016]]]], "drafter": "ngram"}
    (tmp_path / "cost.json").write_text(json.dumps(record | {"command": "bench cost-table", "results": [times]}))
    text = results.tables(tmp_path, tmp_path)
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["chat", "1", "none", "100 (99–101)", "1.00x", "1.00", "–", "–", "–", "100%"] in lines
    ratio, accepted = "0.97x (0.90–1.02)", ".50 .25 .00"
    assert ["chat", "8", "`ngram`", "97 (96–98)", ratio, "1.50", "1.75", accepted, "3.1%", "100%"] in lines
    assert ["1", "64", "1.00 (0.90–1.10)", "1.50 (1.40–1.60)"] in lines
    assert "* `vllm:suffix` failed: no such package." in text
    assert "* `ngram` is slower than no speculation: chat from 8 in flight on (0.25 drafts a step)." in text
    assert "* `ngram` ran out of time before agent with 1 in flight, agent with 8 in flight." in text
    assert "Speculation, tiny, greedy, 2 repeats (model runner V2, CUDA graphs)" in text
