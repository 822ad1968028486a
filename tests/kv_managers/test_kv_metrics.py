"""Counters of evictions: from a worker's file to the collector of the server's process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ext import kv_metrics, metrics, totals


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(metrics, "_folder", lambda: tmp_path)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)


def config(rank: int = 0) -> Any:
    return SimpleNamespace(instance_id="e1", parallel_config=SimpleNamespace(rank=rank))


def read(collector: totals.Collector) -> dict[str, float]:
    return {name: value for name, _, value in collector.read()}


def test_groups_are_summed_and_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(totals.time, "monotonic", lambda: clock[0])
    collector = totals.Collector("e1", kv_metrics.FAMILY, kv_metrics.HELP)
    assert read(collector) == {}
    none = dict.fromkeys(kv_metrics.HELP, 0.0)
    groups = [kv_metrics.Publisher(config(), name) for name in ("a", "b")]
    for publisher in groups:
        publisher.publish(none | {"kv_blocks_freed": 3})
    kv_metrics.Publisher(config(rank=1), "a").publish(none | {"kv_blocks_freed": 100})
    assert read(collector)["kv_blocks_freed"] == 6
    groups[0].publish(none | {"kv_blocks_freed": 5})
    assert read(collector)["kv_blocks_freed"] == 6  # too soon after the last write
    clock[0] += totals.INTERVAL_S
    groups[0].publish(none | {"kv_blocks_freed": 5})
    found = {f.name: f.samples[0].value for f in collector.collect()}
    assert found["vllm_ext:kv_blocks_freed"] == 8
    assert set(found) == {f"vllm_ext:{name}" for name in kv_metrics.HELP}


def test_files_of_an_earlier_engine_do_not_count() -> None:
    publisher = kv_metrics.Publisher(config(), "a")
    publisher.publish(dict.fromkeys(kv_metrics.HELP, 1.0))
    assert read(totals.Collector("e1", kv_metrics.FAMILY, kv_metrics.HELP)) == {}
