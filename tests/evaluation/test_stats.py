"""Intervals against known values and simulated coverage."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vllm_ext import records
from vllm_ext.evaluation.stats import bootstrap_mean, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe (1998), table I, method 3 (Wilson without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_known_values(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_wilson_is_symmetric_and_refuses_nonsense():
    low, high = wilson(3, 10)
    assert wilson(7, 10) == pytest.approx((1 - high, 1 - low))
    for bad in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError):
            wilson(*bad)


def test_bootstrap_covers_the_mean():
    rng = np.random.default_rng(1)
    hits = 0
    for i in range(100):
        groups = [rng.exponential(2.0, size=20) for _ in range(30)]
        low, high = bootstrap_mean(groups, rounds=400, seed=i)
        hits += low <= 2.0 <= high
    assert 85 <= hits <= 100


def test_bootstrap_draws_whole_groups():
    # Ten identical values a text: the spread comes from the texts, not from 10 times as many values.
    apart = bootstrap_mean([[float(i)] for i in range(8)])
    together = bootstrap_mean([[float(i)] * 10 for i in range(8)])
    assert together == pytest.approx(apart)
    assert bootstrap_mean([[1.0, 2.0, 3.0]])[0] >= 1.0
    with pytest.raises(ValueError):
        bootstrap_mean([[]])


def test_record_holds_what_is_needed_and_saves(tmp_path):
    data = records.record("eval", [{"x": 1}], commit="abc", settings={"n": 2})
    assert data["commit"] == "abc"
    assert {"python", "torch", "triton", "vllm", "transformers", "vllm_ext"} <= set(data["versions"])
    assert data["time_utc"].endswith("+00:00")
    assert data["device"]
    path = records.save(data, tmp_path / "deep" / "r.json")
    assert json.loads(path.read_text())["results"] == [{"x": 1}]
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]
