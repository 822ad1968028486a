"""The recorder of `moe_trace` on a stand-in worker: rows find their requests, whatever the batches are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_ext.moe import trace_file
from vllm_ext.moe.method import LayerFacts
from vllm_ext.moe.recorder import Recorder
from vllm_ext.moe.trace import MoETrace

LAYERS, WIDTH, EXPERTS = 2, 3, 16


def routed(request: str, position: int, layer: int) -> list[int]:
    """The experts of a token: a function of request, position and layer; the last column is unused now and then."""
    base = ord(request) * 31 + position * 7 + layer
    return [base % EXPERTS, (base + 5) % EXPERTS, -1 if position % 3 else (base + 9) % EXPERTS]


class Worker:
    """A worker whose steps are batches of (request, first position, tokens)."""

    def __init__(self, plugin: MoETrace, runner: str, dtype_experts: int = EXPERTS) -> None:
        self.device, self.model_runner = torch.device("cpu"), SimpleNamespace()
        self.runner, self.ended = runner, False
        self.model_config = SimpleNamespace(model="/models/tiny")
        self.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(max_cudagraph_capture_size=None))
        facts = [LayerFacts("", i, dtype_experts, 2, 8, 8, True, torch.float32, "cpu", max_tokens=32) for i in (3, 5)]
        self.layers = [SimpleNamespace(facts=f, router=SimpleNamespace(width=WIDTH, observers=[])) for f in facts]
        self.recorder = Recorder(plugin, self, self.layers)

    def compile_or_warm_up_model(self) -> None:
        """As model runner V2 does: a request of its own goes through `execute_model`."""
        self.step([("w", 0, 4)], new=("w",))

    def execute_model(self, output: Any) -> None:
        spans = output.spans
        for layer, found in enumerate(self.layers):
            ids = [routed(r, p, layer) for r, first, count in spans for p in range(first, first + count)]
            for observer in found.router.observers:
                if ids:
                    observer(None, None, None, torch.tensor(ids, dtype=torch.int32))
        names, counts = [s[0] for s in spans], [s[2] for s in spans]
        starts = np.array([s[1] for s in spans], dtype=np.int32)
        if self.runner == "v2":
            batch = SimpleNamespace(
                req_ids=names, query_start_loc_np=np.cumsum([0, *counts]), num_computed_tokens_np=starts
            )
            self.model_runner.execute_model_state = SimpleNamespace(input_batch=batch)
        else:
            self.model_runner.input_batch = SimpleNamespace(req_ids=names, num_computed_tokens_cpu=starts)

    def shutdown(self) -> None:
        self.ended = True

    def step(
        self, spans: Sequence[tuple[str, int, int]], new: Sequence[str] = (), finished: Sequence[str] = ()
    ) -> None:
        """One scheduler step."""
        prompts = [SimpleNamespace(req_id=r, prompt_token_ids=list(range(5))) for r in new]
        counts = {r: c for r, _, c in spans}
        output = SimpleNamespace(
            spans=spans, scheduled_new_reqs=prompts, num_scheduled_tokens=counts, finished_req_ids=set(finished),
            total_num_scheduled_tokens=sum(counts.values()),
        )  # fmt: skip
        self.execute_model(output)


def want(request: str, positions: range) -> np.ndarray:
    """The rows of a request in a trace of few experts."""
    rows = [[routed(request, p, layer) for layer in range(LAYERS)] for p in positions]
    return np.where(np.array(rows) < 0, 255, rows)


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_rows_find_their_requests(runner: str, tmp_path: Path) -> None:
    """Chunks, mixed batches in any order, a prefix hit, recomputed tokens; in the order of arrival, no warm-up."""
    path = tmp_path / "trace"
    worker = Worker(MoETrace(path=str(path)), runner)
    worker.compile_or_warm_up_model()
    worker.step([("b", 4, 3), ("a", 0, 4)], new=("a", "b"))
    worker.step([("a", 4, 2), ("b", 7, 1)])
    worker.step([("a", 0, 6), ("c", 0, 5), ("b", 8, 1)], new=("c",))  # a was preempted and starts again
    worker.step([], finished=("b",))
    worker.shutdown()
    trace = trace_file.load(path)
    assert worker.ended
    assert (trace.model, trace.layers, trace.num_experts, trace.top_k) == ("tiny", (3, 5), EXPERTS, 2)
    assert (trace.first.tolist(), trace.prompt.tolist()) == ([0, 4, 0], [5, 5, 5])
    for got, rows in zip(trace.requests, (want("a", range(6)), want("b", range(4, 9)), want("c", range(5)))):
        assert np.array_equal(got, rows)


def test_the_file_is_bounded_and_written_while_serving(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    worker = Worker(MoETrace(path=str(path), max_tokens=7), "v2")
    worker.compile_or_warm_up_model()
    worker.step([("a", 0, 5)], new=("a",))
    assert not path.exists()
    worker.step([("b", 0, 5)], new=("b",), finished=("a",))
    assert len(trace_file.load(path).experts) == 7
    worker.step([("c", 0, 5)], new=("c",))
    worker.shutdown()
    assert len(trace_file.load(path).first) == 2


def test_requests_are_sampled_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    worker = Worker(MoETrace(path=str(path), share=0.5), "v2")
    worker.compile_or_warm_up_model()
    names = [chr(c) for c in range(ord("a"), ord("z"))]
    for name in names:
        worker.step([(name, 0, 4)], new=(name,))
        worker.step([(name, 4, 1)], finished=(name,))
    worker.shutdown()
    trace = trace_file.load(path)
    assert 5 <= len(trace.first) <= 20
    assert set(np.diff(trace.offsets)) == {5}


def test_many_experts_take_two_bytes(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    worker = Worker(MoETrace(path=str(path)), "v2", dtype_experts=300)
    worker.compile_or_warm_up_model()
    worker.step([("a", 0, 5)], new=("a",))
    worker.shutdown()
    trace = trace_file.load(path)
    assert trace.experts.dtype == np.int16
    assert trace.none == -1
    assert np.array_equal(trace.experts[:, 0, :2], want("a", range(5))[:, 0, :2])
    assert trace.experts.min() == -1


def test_a_disk_that_cannot_be_written_does_not_stop_serving(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    worker = Worker(MoETrace(path=str(folder / "trace")), "v1")
    worker.compile_or_warm_up_model()
    worker.step([("a", 0, 5)], new=("a",))
    folder.rmdir()
    worker.shutdown()
    assert worker.ended
