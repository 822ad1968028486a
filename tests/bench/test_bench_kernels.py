"""`bench kernels` without a GPU: what a failure costs, and that timing starts on a quiet device."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from vllm_ext.bench import kernels, method_ops
from vllm_ext.bench.decode import Case
from vllm_ext.cli import main
from vllm_ext.evaluation import worker
from vllm_ext.options import ConfigError

CASES = [Case(1, 1024), Case(2, 1024)]
NAMES = ["fa3 (dense)", "score_select", "update_index, prefill"]


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Times without a device: 2 s of a baseline, 1 s of others; names in the list fault and take the context along."""
    faulty: list[str] = []
    state = {"alive": True}

    def entry(name: str) -> Any:
        def make(batch: kernels.Batch) -> tuple[float, Any]:
            if name in faulty:
                state["alive"] = False
            if not state["alive"]:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return 8.0, name

        return make

    def synchronize() -> None:
        if not state["alive"]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def here(target: str, job: dict[str, Any]) -> dict[str, Any]:
        assert target == "vllm_ext.bench.kernels:run_job"
        state["alive"] = True  # a fresh process
        return json.loads(json.dumps(kernels.run_job(json.loads(json.dumps(job)))))

    make_batch = kernels.make_batch
    monkeypatch.setattr(kernels, "KERNELS", {name: entry(name) for name in NAMES})
    monkeypatch.setattr(kernels, "make_batch", lambda case, budget: make_batch(case, budget, device="cpu"))
    monkeypatch.setattr(kernels, "_score_select", lambda batch: (0.0, lambda layer: None))
    monkeypatch.setattr(kernels, "measure", lambda name, layers: 2.0 if "(dense)" in name else 1.0)
    monkeypatch.setattr(kernels, "error", lambda batch, name: None)
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda: 4.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(worker, "fresh_process", here)
    return faulty


@pytest.mark.usefixtures("dead")
def test_rows_arrive_case_by_case() -> None:
    seen: list[int] = []
    results = kernels.run(CASES, None, 256, lambda results: seen.append(len(results)))
    assert seen == [3, 6]
    assert [(r["case"], r["kernel"]) for r in results] == [(c.label, n) for c in CASES for n in NAMES]
    assert results[1] == {
        "case": "1x1024", "kernel": "score_select", "budget": 256, "time_s": 1.0, "bytes": 8.0, "floor_s": 2.0,
        "error": None, "bandwidth": 4.0, "vs_dense": 2.0,
    }  # fmt: skip
    assert "vs_dense" not in results[2]
    assert [r["kernel"] for r in kernels.run(CASES, ["score_select"], 256)] == ["score_select"] * 2


@pytest.mark.usefixtures("dead")
def test_a_baseline_that_is_not_installed_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(batch: kernels.Batch) -> Any:
        raise ModuleNotFoundError("No module named 'flash'")

    monkeypatch.setitem(kernels.KERNELS, "fa3 (dense)", absent)
    rows = kernels.run(CASES[:1], None, 256)
    assert [r["kernel"] for r in rows] == NAMES
    assert rows[0]["skipped"] == "ModuleNotFoundError: No module named 'flash'"
    assert all("failed" not in r and "vs_dense" not in r for r in rows)


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_fault_ends_its_case_and_is_not_blamed_on_the_next_kernel(dead: list[str], name: str) -> None:
    dead.append(name)
    results = kernels.run(CASES, None, 256)
    assert [r["kernel"] for r in results] == 2 * NAMES[: NAMES.index(name) + 1]
    for row in results:
        if row["kernel"] == name:
            assert row["failed"]
            assert "illegal memory access" in row["skipped"]
        else:
            assert row["time_s"] == 2.0


@pytest.mark.usefixtures("dead")
def test_other_cases_outlive_a_process_and_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = worker.fresh_process

    def dies_first(target: str, job: dict[str, Any]) -> dict[str, Any]:
        if job["label"] == CASES[0].label:
            raise ConfigError(f"row '{job['label']}' failed (exit code -6); its messages are above.")
        return inner(target, job)

    monkeypatch.setattr(worker, "fresh_process", dies_first)
    cases = [word for c in CASES for word in ("--case", c.label)]
    arguments = ["vllm-ext", "bench", "kernels", "--budget", "256", "--out", str(tmp_path), *cases]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr("vllm_ext.records.record", lambda kind, results, **_: {"results": results})
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert "--case 1x1024 failed" in said.err
    assert "exit code -6" in said.out
    results = json.loads((tmp_path / "kernels.json").read_text())["results"]
    assert [r["kernel"] for r in results] == ["every kernel", *NAMES]


def test_timing_starts_when_the_device_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer's stream waits for nothing; calls on two streams would share scratch and read unwritten inputs."""
    events: list[str] = []

    def bench(walk: Any, rep: int, return_mode: str) -> float:
        events.append("timer")
        walk()
        return 4.0

    monkeypatch.setattr("triton.testing.do_bench_cudagraph", bench)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    layers: Any = ["a", "b"]
    assert kernels.measure(events.append, layers) == pytest.approx(2e-3)
    assert events == ["a", "b", "synchronize", "timer", "a", "b"]


@pytest.mark.parametrize("name", ["seer", "infllm_v2", "lychee"])
def test_the_op_of_a_method_attends_and_counts(name: str) -> None:
    """In the interpreter: every layer is written, and the floor lies between the listed keys and all of them."""
    torch.manual_seed(0)
    batch = kernels.make_batch(Case(1, 520), 448, device="cpu")
    batch.layers = batch.layers[:1]
    options = method_ops.METHODS[name] | ({"local": 2} if name == "infllm_v2" else {})
    floor, call = method_ops.entry(name, options)(batch)
    key = 2 * kernels.SIZE * 2
    assert kernels.HEADS * 6 * 64 * key <= floor <= kernels.HEADS * 519 * key * 1.2
    for layer in batch.layers:
        layer.out.fill_(float("nan"))
        call(layer)
        assert layer.out.isfinite().all()
        assert layer.out.float().std() > 0.01
