"""The draft-length policy against exhaustive search, and its cost table."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_ext.options import ConfigError, build
from vllm_ext.spec_decode import draft_length as dl
from vllm_ext.spec_decode.cast import Cast
from vllm_ext.spec_decode.fixed import Fixed
from vllm_ext.spec_decode.history import AcceptanceHistory
from vllm_ext.spec_decode.protocols import LengthInput


def known(survival: np.ndarray, *, choices: tuple[int, ...] = (0, 1, 2, 4), uniform: bool = True) -> LengthInput:
    return LengthInput(survival, np.full(len(survival), 100), choices, uniform)


def table(seconds: Any, batch: tuple[int, ...] = (1, 8), drafts: tuple[int, ...] = (0, 1, 2, 4)) -> dl.CostTable:
    axes = [np.asarray(a, dtype=float) for a in (batch, drafts, (100,))]
    return dl.CostTable(*axes, np.asarray(seconds, dtype=float)[None], {})


def random_survival(rng: np.random.Generator, requests: int, k: int) -> np.ndarray:
    return np.cumprod(rng.uniform(0.2, 1.0, (requests, k)), axis=1)


def test_uniform_length_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        survival = random_survival(rng, 3, 6)
        seconds = np.sort(rng.uniform(1, 3, 7))
        rates = [(1 + survival[:, :k].sum(1).mean()) / seconds[k] for k in range(7)]
        assert dl.uniform_length(survival, seconds, 1.0) == int(np.argmax(rates))


def test_ragged_lengths_are_the_best_of_all() -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        survival = random_survival(rng, 3, 3)
        seconds = np.cumsum(rng.uniform(0.1, 1, 4))
        seconds[0] += 1
        got = dl.ragged_lengths(survival, seconds, 1.0)

        def rate(lengths: tuple[int, ...], survival: np.ndarray = survival, seconds: np.ndarray = seconds) -> float:
            tokens = 3 + sum(survival[i, :n].sum() for i, n in enumerate(lengths))
            return tokens / np.interp(sum(lengths) / 3, np.arange(4), seconds)

        best = max(rate(lengths) for lengths in itertools.product(range(4), repeat=3))
        assert rate(tuple(got)) == pytest.approx(best)


def test_drafts_stop_where_they_do_not_pay() -> None:
    """Cost that grows in proportion to the tokens leaves nothing to gain, free drafts are all taken."""
    survival = np.full((4, 4), 0.9) ** np.arange(1, 5)
    proportional, free = table([[1, 2, 3, 5]] * 2), table([[1, 1, 1, 1]] * 2)
    assert dl.CastPolicy(proportional, 1.0, 0.0).choose(known(survival)).tolist() == [0] * 4
    assert dl.CastPolicy(free, 1.0, 0.0).choose(known(survival)).tolist() == [4] * 4


def test_step_costs_snap_to_their_steps() -> None:
    """Two drafts cost as one does: one is never the best choice."""
    survival = np.full((2, 4), 0.6) ** np.arange(1, 5)
    policy = dl.CastPolicy(table([[1, 1.3, 1.3, 4.0]] * 2), 1.0, 0.0)
    assert policy.choose(known(survival)).tolist() == [2, 2]


def test_large_batches_turn_drafting_off() -> None:
    survival = np.full((1, 4), 0.6) ** np.arange(1, 5)
    costs = table([[1, 1.02, 1.05, 1.1], [1, 1.8, 2.5, 4.0]], batch=(1, 32))
    policy = dl.CastPolicy(costs, 1.0, 0.0)
    assert policy.choose(known(survival)).tolist() == [4]
    assert policy.choose(known(np.tile(survival, (20, 1)))).tolist() == [0] * 20


def test_only_choices_are_made() -> None:
    rng = np.random.default_rng(2)
    policy = dl.CastPolicy(table([[1, 1.1, 1.2, 1.4]] * 2), 1.0, 0.0)
    for uniform in (True, False):
        for _ in range(30):
            lengths = policy.choose(known(random_survival(rng, 5, 4), choices=(0, 2, 4), uniform=uniform))
            assert lengths.min() >= 0
            assert lengths.max() <= 4
            assert not uniform or set(lengths.tolist()) in ({0}, {2}, {4})
    assert policy.choose(known(np.empty((0, 4)))).tolist() == []


def test_ragged_lengths_go_where_drafts_survive() -> None:
    survival = np.array([[0.9, 0.8, 0.7, 0.6], [0.1, 0.0, 0.0, 0.0]])
    lengths = dl.CastPolicy(table([[1, 1.3, 1.6, 2.2]] * 2), 1.0, 0.0).choose(known(survival, uniform=False))
    assert lengths[0] > lengths[1] == 0


def test_margin_keeps_drafting_off() -> None:
    survival = np.full((1, 4), 0.105)
    costs = table([[1, 1.1, 9, 9]] * 2)
    assert dl.CastPolicy(costs, 1.0, 0.0).choose(known(survival)).tolist() == [1]
    assert dl.CastPolicy(costs, 1.05, 0.0).choose(known(survival)).tolist() == [0]


def test_probing_keeps_to_its_share() -> None:
    """While drafting does not pay, drafts take a hundredth of the time, and are tried again and again."""
    policy = dl.CastPolicy(table([[1.0, 1.4, 3, 5]] * 2), 1.0, 0.01)
    chosen = [int(policy.choose(known(np.zeros((1, 4))))[0]) for _ in range(4000)]
    assert set(chosen) == {0, 1}
    spent = 0.4 * sum(chosen) / len(chosen)
    assert 0.009 < spent <= 0.01


def test_requests_without_drafts_are_probed_beside_others() -> None:
    """One request's drafts survive, the other's do not: those are tried within their share of the time, in turn."""
    survival = np.array([[0.9, 0.8, 0.7, 0.6], [0.0, 0.0, 0.0, 0.0]])
    policy = dl.CastPolicy(table([[1.0, 1.1, 1.2, 1.4]] * 2), 1.0, 0.01)
    chosen = np.stack([policy.choose(known(survival, uniform=False)) for _ in range(400)])
    assert set(chosen[:, 0]) == {4}
    assert set(chosen[:, 1]) == {0, 1}
    assert 0.05 < chosen[:, 1].mean() <= 0.01 * 1.2 / 0.05  # a probe costs half of 0.1 in a step of 1.2


LOADS = (0.0, 0.3, 0.6, 0.9, (0.9, 0.1))
"""Probability that a draft is accepted, the same for all requests or in turn."""


def tokens_a_second(batch: int, load: Any, choose: Any) -> float:
    """Requests of 160 tokens, `batch` at a time, 300 steps; drafts pay less in large batches."""
    rng, history, axis = np.random.default_rng(0), AcceptanceHistory(7), (0, 2, 4, 7)
    seconds = {1: [1, 1.02, 1.05, 1.1], 8: [1, 1.2, 1.45, 1.9], 32: [1, 1.7, 2.4, 3.6]}
    policy = dl.CastPolicy(table(list(seconds.values()), tuple(seconds), axis), 1.02, 0.01)
    right, names = np.resize(load, batch), [str(i) for i in range(batch)]
    left, tokens, taken = rng.integers(1, 160, batch), 0, 0.0
    for step in range(300):
        known = LengthInput(history.survival(names), np.full(batch, 100), axis, choose == "batch")
        lengths = np.full(batch, choose) if isinstance(choose, int) else policy.choose(known)
        taken += np.interp(lengths.mean(), axis, seconds[batch])
        for i, length in enumerate(lengths.tolist()):
            passed = rng.random(length) < right[i]
            accepted = length if passed.all() else int(passed.argmin())
            history.note(names[i], length, accepted)
            tokens, left[i] = tokens + accepted + 1, left[i] - accepted - 1
            if left[i] <= 0:
                left[i], names[i] = 160, f"{step}-{i}"
    return tokens / taken


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("load", LOADS, ids=str)
def test_it_never_loses_and_finds_the_best_length(batch: int, load: Any) -> None:
    """From knowing nothing: 0.97 of no drafts or more, near the best length; lengths by request gain on mixtures."""
    fixed = [tokens_a_second(batch, load, k) for k in (0, 2, 4, 7)]
    for scope in ("batch", "request"):
        assert tokens_a_second(batch, load, scope) > max(0.97 * fixed[0], 0.93 * max(fixed))
    if load == (0.9, 0.1) and batch > 1:
        assert tokens_a_second(batch, load, "request") > 1.15 * max(fixed)


def test_scheduler_cuts_drafts_to_the_chosen_lengths() -> None:
    """Two requests with four drafts each get 0 and 2; one that nothing was chosen for keeps its own."""
    from vllm_ext.spec_decode.scheduler import _Speculation

    class Scheduler(_Speculation):
        def __init__(self) -> None:
            names = ("a", "b", "new")
            self.running = [SimpleNamespace(request_id=n, spec_token_ids=[-1] * 4) for n in names]

    class Base:
        def schedule(self, throttle: bool) -> list[int]:
            return [len(r.spec_token_ids) for r in self.running]

    scheduler = type("Both", (Scheduler, Base), {})()
    assert scheduler.schedule(False) == [4, 4, 4]
    scheduler.spec_lengths = {"a": 0, "b": 2, "gone": 1}
    assert scheduler.schedule(False) == [0, 2, 4]


def test_fixed() -> None:
    survival = np.zeros((3, 4))
    assert dl.FixedPolicy(2).choose(known(survival)).tolist() == [2] * 3
    assert dl.FixedPolicy(3).choose(known(survival)).tolist() == [2] * 3
    assert dl.FixedPolicy(0).choose(known(survival)).tolist() == [0] * 3


def test_table_rounds_batches_up_and_is_linear_in_context() -> None:
    axes = [np.array([1.0, 8.0]), np.array([0.0, 2.0]), np.array([100.0, 300.0])]
    seconds = np.array([[[1.0, 2.0], [3.0, 4.0]], [[2.0, 3.0], [5.0, 8.0]]])
    costs = dl.CostTable(*axes, seconds, {})
    assert costs.at(1, 100) == pytest.approx([1, 2])
    assert costs.at(3, 100) == pytest.approx([3, 4])
    assert costs.at(8, 200) == pytest.approx([4, 6])
    assert costs.at(8, 9999) == pytest.approx([5, 8])
    assert costs.at(16, 100) == pytest.approx([6, 8])


def test_it_is_quick() -> None:
    rng = np.random.default_rng(3)
    policy = dl.CastPolicy(table([[1, 1.1, 1.2, 1.4]] * 2), 1.0, 0.0)
    for uniform in (True, False):
        asked = known(random_survival(rng, 64, 8), choices=(0, 2, 4), uniform=uniform)
        times = []
        for _ in range(50):
            began = time.perf_counter()
            policy.choose(asked)
            times.append(time.perf_counter() - began)
        assert min(times) < 5e-4


def record(path: Path, **changes: Any) -> str:
    result = {
        "device": "cpu", "model": {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 32}, "drafter": "ngram",
        "batch": [1, 8], "drafts": [0, 4], "context": [64], "seconds": [[[1.0, 1.2], [1.5, 3.0]]],
    } | changes  # fmt: skip
    path.write_text(json.dumps({"results": [result]}))
    return str(path)


def test_table_file(tmp_path: Path) -> None:
    costs = dl.read_table(record(tmp_path / "t.json"))
    assert costs.at(5, 64) == pytest.approx([1.5, 3.0])
    assert costs.about["drafter"] == "ngram"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"seconds": [[[1.0, 1.2]]]}, "do not fit"),
        ({"seconds": [[[0.0, 1.2], [1.5, 3.0]]]}, "do not fit"),
        ({"drafts": [1, 4]}, "do not fit"),
        ({"batch": [8, 1]}, "ascend"),
        ({"context": None}, "no cost table"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        dl.read_table(record(tmp_path / "t.json", **changes))


def test_missing_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bench cost-table"):
        dl.read_table(str(tmp_path / "none.json"))
    (tmp_path / "text").write_text("no JSON")
    with pytest.raises(ConfigError, match="bench cost-table"):
        dl.read_table(str(tmp_path / "text"))
    with pytest.raises(ConfigError, match=r"cast\.table names no file"):
        Cast().policy(None)


def test_tables_of_something_else_are_refused(tmp_path: Path) -> None:
    from vllm.platforms import current_platform

    device = current_platform.get_device_name()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 32}
    cfg = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=SimpleNamespace(**sizes)))
    dl.check_table(dl.read_table(record(tmp_path / "a", device=device)), cfg, (0, 4))
    elsewhere = dl.read_table(record(tmp_path / "b", device="another"))
    with pytest.raises(ConfigError, match="this device is"):
        dl.check_table(elsewhere, cfg, (0, 4))
    other = dl.read_table(record(tmp_path / "c", device=device, model=sizes | {"vocab_size": 33}))
    with pytest.raises(ConfigError, match="this one is"):
        dl.check_table(other, cfg, (0, 4))
    short = dl.read_table(record(tmp_path / "d", device=device))
    with pytest.raises(ConfigError, match="reaches 8 drafts"):
        dl.check_table(short, cfg, (0, 8))


def test_fixed_length_must_be_captured() -> None:
    assert build(Fixed, "fixed", {"drafts": 2, "lengths": [0, 2]}).policy(None).drafts == 2
    with pytest.raises(ConfigError, match=r"fixed\.lengths"):
        build(Fixed, "fixed", {"drafts": 3})
