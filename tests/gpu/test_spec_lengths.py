"""Draft lengths by request on a GPU: model runner V2, asynchronous scheduling, mixed lengths in a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_spec import differences, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def table(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cost table under which drafts pay that are likely to survive."""
    from vllm_ext.spec_decode.draft_length import SHAPE

    sizes = json.loads((Path(smollm2_dir) / "config.json").read_text())
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "model": {k: sizes[k] for k in SHAPE}}
    result |= {"drafter": "suffix_automaton", "context": [64], "batch": [1, 8], "drafts": [0, 6]}
    result |= {"seconds": [[[1.0, 2.6], [1.0, 2.6]]]}
    path = tmp_path_factory.mktemp("costs") / "table.json"
    path.write_text(json.dumps({"results": [result]}))
    return str(path)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_requests_have_lengths_of_their_own(smollm2_dir: str, table: str, monkeypatch, eager: bool) -> None:
    """Answers are those without speculation; some steps verify drafts of some requests and none of others."""
    from vllm_ext.spec_decode.scheduler import AsyncSpeculationScheduler

    stock, steps, schedule = run(smollm2_dir, {}), [], AsyncSpeculationScheduler.schedule

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        decoding = {r.request_id for r in self.running if not r.is_prefill_chunk}
        output = schedule(self, *args, **kwargs)
        drafted = output.scheduled_spec_decode_tokens
        steps.append({len(drafted.get(r, ())) for r in output.num_scheduled_tokens if r in decoding})
        return output

    monkeypatch.setattr(AsyncSpeculationScheduler, "schedule", noted)
    plugins = {
        "suffix_automaton": {"num_speculative_tokens": 6},
        "cast": {"table": table, "scope": "request", "lengths": [0, 2, 4, 6]},
    }
    found = run(smollm2_dir, plugins, enforce_eager=eager)
    assert (found["v2"], found["async"]) == (True, True)
    assert any(len(counts) > 1 and 0 in counts for counts in steps)
    assert found["accepted"] > 0
    assert differences(stock, found) == []
