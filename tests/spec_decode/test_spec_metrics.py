"""Speculation counters on their way from a worker to the server's registry, and the estimates for length policies."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_ext import metrics, spec_metrics, totals
from vllm_ext.spec_decode import active
from vllm_ext.spec_decode.history import AcceptanceHistory
from vllm_ext.spec_decode.lookup import ARMS


@pytest.fixture
def config(tmp_path, monkeypatch):
    """An engine whose counter files lie in a folder of the test."""
    monkeypatch.setattr(metrics, "_folder", lambda: tmp_path)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    return lambda rank=0: SimpleNamespace(
        instance_id="e1", additional_config={}, parallel_config=SimpleNamespace(rank=rank)
    )


def test_counters_reach_the_registry(config):
    collector = totals.Collector("e1", spec_metrics.FAMILY, spec_metrics.HELP)
    counters = np.zeros((len(ARMS), 5), np.int64)
    counters[0], counters[2] = [3, 6, 4, 3, 1], [1, 2, 0, 0, 0]
    spec_metrics.Publisher(config(1), "hsd").publish(ARMS, counters * 100, 1.0)  # other ranks stay silent
    spec_metrics.Publisher(config(), "hsd").publish(ARMS, counters, 0.5)
    found = {(s.name, *s.labels.values()): s.value for family in collector.collect() for s in family.samples}
    assert found[("vllm_ext:spec_drafted_total", "longest", "hsd")] == 6
    assert found[("vllm_ext:spec_accepted_total", "longest", "hsd")] == 4
    assert found[("vllm_ext:spec_accepted_at_total", "longest", "hsd", "1")] == 1
    assert found[("vllm_ext:spec_steps_total", "ngram", "hsd")] == 1
    assert found[("vllm_ext:spec_draft_seconds_total", "all", "hsd")] == 0.5
    assert not any("first" in key for key in found)


def test_the_scheduler_counts_for_model_drafters(config):
    """Three drafts of a request, one with nothing drafted; no seconds, which the GPU spends."""
    collector = totals.Collector("e1", spec_metrics.FAMILY, spec_metrics.HELP)
    counters = active.DraftCounters(config(), "pard", 4)
    for drafted, accepted in ((4, 4), (4, 1), (0, 0), (3, 0)):
        counters.note(drafted, accepted)
    counters.publish()
    found = {(name, labels.get("position")): (value, labels["drafter"]) for name, labels, value in collector.read()}
    assert {key: value for key, (value, _) in found.items()} == {
        ("spec_steps", None): 3, ("spec_drafted", None): 11, ("spec_accepted", None): 5, ("spec_accepted_at", "0"): 2,
        ("spec_accepted_at", "1"): 1, ("spec_accepted_at", "2"): 1, ("spec_accepted_at", "3"): 1,
    }  # fmt: skip
    assert {drafter for _, drafter in found.values()} == {"pard"}


def test_files_of_an_earlier_engine_do_not_count(config):
    spec_metrics.Publisher(config(), "standard").publish(ARMS, np.ones((len(ARMS), 5), np.int64), 0.0)
    assert totals.Collector("e1", spec_metrics.FAMILY, spec_metrics.HELP).read() == []


def test_writes_are_spaced(config, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(totals.time, "monotonic", lambda: clock[0])
    collector = totals.Collector("e1", spec_metrics.FAMILY, spec_metrics.HELP)
    publisher = spec_metrics.Publisher(config(), "standard")
    counters = np.ones((len(ARMS), 5), np.int64)
    for at, want in ((1.0, 1), (1.1, 1), (1.3, 3)):
        clock[0] = at
        publisher.publish(ARMS, counters * want, 0.0)
        assert collector.read()[0][2] == want
        counters = np.ones_like(counters)


def test_history_finds_the_rates():
    """A request whose drafts survive with probability 0.8 a position, and one whose drafts never do."""
    rng, history = np.random.default_rng(0), AcceptanceHistory(4)
    for _ in range(400):
        passed = rng.random(4) < 0.8
        history.note("good", 4, int(passed.argmin()) if not passed.all() else 4)
        history.note("bad", 4, 0)
    good, bad = history.survival(["good", "bad"])
    assert np.all(np.diff(good) <= 0)
    assert good == pytest.approx(0.8 ** np.arange(1, 5), abs=0.25)
    assert bad[0] < 0.05
    new = history.survival(["new"])[0]
    assert bad[0] < new[0] < good[0]  # what is not known yet is taken from all requests


def test_positions_that_were_not_tried_do_as_those_before_them():
    history = AcceptanceHistory(4)
    for _ in range(50):
        history.note("a", 2, 2)
        history.note("a", 0, 0)
        history.note("b", 2, 0)
    [good, bad] = history.rates(["a", "b"])
    assert good[1] > 0.9
    assert good[2:] == pytest.approx(good[1], abs=0.05)
    assert bad[0] < 0.1
    for _ in range(50):
        history.note("c", 4, 3)  # where it was tried, the last position is never right
    assert history.rates(["a"])[0][3] < 0.2 < 0.9 < history.rates(["a"])[0][2]
