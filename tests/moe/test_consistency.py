"""SRP, SCH and load against brute force and closed forms; trace files and the report made of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vllm_ext.moe import consistency, report, trace_file
from vllm_ext.options import ConfigError


def random_ids(rng: np.random.Generator, tokens: int, experts: int = 8, k: int = 2, stay: float = 0.6) -> np.ndarray:
    """[T, K] distinct experts; with probability `stay` a token uses those of the token before."""
    ids = np.empty((tokens, k), dtype=np.int64)
    for t in range(tokens):
        keep = t and rng.random() < stay
        ids[t] = ids[t - 1] if keep else rng.choice(experts, k, replace=False)
    return ids


def active(seed: int, tokens: int = 64, **kwargs: float) -> np.ndarray:
    return consistency.activations(random_ids(np.random.default_rng(seed), tokens, **kwargs), 8)


def brute_srp(layers: list[np.ndarray], window: int) -> float:
    """Best F1 over thresholds, window by window."""
    found = []
    for a in range(window + 1):
        matches = preds = acts = 0
        for layer in layers:
            for t in range(len(layer) - window + 1):
                for c in layer[t : t + window].sum(0):
                    acts += c
                    if c >= a:
                        matches, preds = matches + c, preds + window
        found.append(2 * matches / max(preds + acts, 1))
    return max(found)


@pytest.mark.parametrize("window", [1, 4, 16])
def test_srp_equals_brute_force(window: int) -> None:
    layers = [active(s, 64 if s else 40) for s in range(3)]
    found = consistency.srp(consistency.window_counts(layers, window))
    assert found.f1 == pytest.approx(brute_srp(layers, window), rel=1e-12)


def test_no_choice_of_windows_beats_the_threshold() -> None:
    """All 2^9 choices of switched-on windows of one expert."""
    for seed in range(20):
        layer = active(seed, 12)[:, :1]
        counts = [int(layer[t : t + 4].sum()) for t in range(9)]
        best = 0.0
        for chosen in itertools.product((0, 1), repeat=9):
            matches = sum(c for c, on in zip(counts, chosen) if on)
            best = max(best, 2 * matches / max(4 * sum(chosen) + sum(counts), 1))
        assert consistency.srp(consistency.window_counts([layer], 4)).f1 == pytest.approx(best)


def test_srp_is_one_for_constant_routing_and_at_least_all_on() -> None:
    constant = consistency.activations(np.tile([[1, 5]], (64, 1)), 8)
    found = consistency.srp(consistency.window_counts([constant], 16))
    assert (found.f1, found.scale) == (1.0, 1.0)
    counts = consistency.window_counts([active(0)], 16)
    share = 2 / 8  # of experts that a token uses: precision of the router that switches everything on
    assert consistency.srp(counts).f1 >= 2 * share / (1 + share)


def brute_cache(layer: np.ndarray, slots: int, window: int) -> float:
    """SCH by its definition: a list of slots, one token after the other."""
    cache: dict[int, int] = {}
    hits = 0
    for t, row in enumerate(layer):
        need = set(np.flatnonzero(row))
        for e in sorted(need):
            if e in cache or len(cache) < slots:
                hits += 1
            elif e not in cache:
                future = layer[t + 1 : t + 1 + window].sum(0)
                victim = min((v for v in cache if v not in need), key=lambda v: (future[v], cache[v], v))
                del cache[victim]
            cache[e] = t
    return hits / layer.sum()


@pytest.mark.parametrize(("slots", "window"), [(2, 4), (3, 4), (4, 16), (6, 2)])
def test_cache_hit_rate_equals_brute_force(slots: int, window: int) -> None:
    for seed in range(10):
        layer = active(seed)
        found = consistency.hit_rate([layer], slots, "sch", window)
        assert found == pytest.approx(brute_cache(layer, slots, window), rel=1e-12)


def test_belady_is_never_worse_and_a_full_cache_always_hits() -> None:
    for seed in range(30):
        layer = active(seed, stay=0.3)
        rates = {p: consistency.hit_rate([layer], 4, p, 16) for p in ("belady", "sch", "lru")}
        assert rates["belady"] >= max(rates["sch"], rates["lru"]) - 1e-12
        assert consistency.hit_rate([layer], 8) == 1.0
    with pytest.raises(ValueError, match="2 experts"):
        consistency.hit_rate([layer], 1)


def test_segments_are_independent_and_may_differ_in_length() -> None:
    """Padding adds nothing: a batch of segments gives the mean of the segments, weighted by their pairs."""
    layers = [active(s, n) for s, n in ((0, 64), (1, 17), (2, 40))]
    for policy in ("sch", "lru", "belady"):
        alone = sum(consistency.hit_rate([a], 4, policy) * a.sum() for a in layers) / sum(a.sum() for a in layers)
        assert consistency.hit_rate(layers, 4, policy) == pytest.approx(alone)


def test_a_cache_worked_out_by_hand() -> None:
    """Experts 0 to 3 find free slots; 4, 5, 6, 7 and the second 3 push out 3, 4, 1 and 5 (tied: the oldest), 2."""
    ids = [[0, 1], [2, 3], [0, 4], [1, 5], [0, 2], [6, 7], [0, 6], [3, 7], [0, 6]]
    layer = consistency.activations(np.array(ids), 8)
    found, needed = consistency.hits([layer], 4, "sch", 4)
    assert (found.tolist(), needed.tolist()) == ([13], [18])


def test_intervals_cover_the_mean_of_many_segments() -> None:
    """A bootstrap over segments: as wide as the spread of the segments says, and a point where they are equal."""
    layers = [active(s, 64, stay=0.1 + 0.02 * (s % 40)) for s in range(80)]
    found, needed = consistency.hits(layers, 4)
    low, high = consistency.hit_interval(found, needed)
    rates = found / needed
    assert low < consistency.hit_rate(layers, 4) < high
    assert (high - low) / 3.92 == pytest.approx(rates.std() / 80**0.5, rel=0.2)
    counts = np.stack([consistency.window_counts([a], 16).sum(0) for a in layers])
    low, high = consistency.srp_interval(counts)
    assert low < consistency.srp(counts).f1 < high < low + 0.1
    same = consistency.srp_interval(np.repeat(counts[:1], 5, axis=0))
    assert same == pytest.approx([consistency.srp(counts[:1]).f1] * 2)


def test_load_of_a_known_layer() -> None:
    found = consistency.load([consistency.activations(np.array([[0, 1], [0, 2], [0, 255]]), 4)])
    assert found.share.tolist() == pytest.approx([3 / 5, 1 / 5, 1 / 5, 0])
    assert found.imbalance == pytest.approx(3 / 1.25)
    assert found.unused == 1


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Three requests through two layers; the second always uses the same experts."""
    rng = np.random.default_rng(0)
    lengths = [300, 700, 40]
    ids = np.stack([random_ids(rng, sum(lengths)), np.tile([[3, 4]], (sum(lengths), 1))], axis=1).astype(np.uint8)
    path = tmp_path / "trace.safetensors"
    first, prompt = np.zeros(3, np.int32), np.array(lengths, np.int32)
    trace_file.Trace("tiny", 8, 2, (0, 1), ids, np.cumsum([0, *lengths]), first, prompt).save(path)
    return path


def test_report_of_a_trace(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import sys

    from vllm_ext.cli import main

    monkeypatch.setattr(sys, "argv", ["vllm-ext", "moe", "report", str(trace), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert "1040 tokens of 3 requests" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "moe-report.json").read_text())["results"]
    assert (tmp_path / "out" / "moe-report.png").stat().st_size > 10_000
    assert found["segments"] == 4
    steady = found["layers"][1]
    low, high = found["srp"]["16"]["interval"]
    assert low <= found["srp"]["16"]["f1"] <= high
    assert all(r["sch_interval"][0] <= r["sch"] <= r["sch_interval"][1] for r in found["layers"][0]["cache"])
    assert (steady["srp"]["256"]["f1"], steady["imbalance"], steady["unused"]) == (1.0, 4.0, 6)
    assert found["slots"][1] == 2
    assert found["layers"][0]["srp"]["16"]["f1"] < 1


def test_recommended_cache_is_the_smallest_that_reaches_the_target() -> None:
    rows = [{"slots": 2, "sch": 0.5}, {"slots": 4, "sch": 0.9}, {"slots": 8, "sch": 1.0}]
    assert report.recommend([rows, rows[:1]], 0.9) == [4, None]


def test_a_trace_of_another_name_is_taken_with_a_note(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model may have been renamed; what it cannot be by its size is refused."""
    found = trace_file.load(trace)
    sizes = (found.num_experts, found.top_k, list(found.layers))
    trace_file.check_model(found, trace, *sizes, found.model)
    assert not capsys.readouterr().err
    trace_file.check_model(found, trace, *sizes, "renamed")
    assert f"of {found.model}, taken for renamed" in capsys.readouterr().err


def test_wrong_traces_are_refused(trace: Path, tmp_path: Path, tiny_moe: Callable, assert_refused: Callable) -> None:
    from safetensors.numpy import save_file

    other = tmp_path / "other.safetensors"
    save_file({"experts": np.zeros((2, 2), np.uint8)}, other)
    assert_refused(["moe", "report", str(other)], "not a routing trace")
    assert_refused(["moe", "report", str(tmp_path / "none")], "cannot be read")
    assert_refused(["moe", "report", str(trace), "--target", "1.5"], "--target")
    assert_refused(["moe", "report", str(trace), "--segments", "0"], "--segments")
    assert_refused(["moe", "report", str(trace), "--out", "/dev/null/out"], "cannot be made")
    assert_refused(["moe", "report", str(trace), "--model", str(tmp_path)], "config.json")
    from vllm_ext.moe.models import tiny_moe as make

    larger = make(tmp_path / "larger", experts=16)
    assert_refused(["moe", "report", str(trace), "--model", str(larger)], "trace that model")
    merge = ["moe", "merge", str(larger), str(tmp_path / "out"), "--experts", "4", "--trace", str(trace)]
    assert_refused(merge, "trace that model")
    assert not (tmp_path / "out").exists()
    empty = tmp_path / "empty.safetensors"
    none = np.zeros(0, np.int32)
    trace_file.Trace("tiny", 8, 2, (0, 1), np.zeros((0, 2, 2), np.uint8), np.zeros(1, np.int64), none, none).save(empty)
    with pytest.raises(ConfigError, match="no tokens"):
        trace_file.load(empty)
