"""Thresholds of ThinKV: modes of a density, the choice of layers, and the whole command on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_ext.kernels import kv_score_think as formula
from vllm_ext.kv_managers import think_thresholds
from vllm_ext.kv_managers.think_thresholds import Thoughts
from vllm_ext.options import ConfigError
from vllm_ext.training import thoughts


def mixture(*parts: tuple[float, float, int], seed: int = 0) -> torch.Tensor:
    """Samples of normal distributions (mean, deviation, count)."""
    gen = torch.Generator().manual_seed(seed)
    return torch.cat([mean + width * torch.randn(n, generator=gen) for mean, width, n in parts])


THREE = mixture((0.2, 0.03, 400), (0.5, 0.03, 500), (0.8, 0.03, 300))
TWO = mixture((0.3, 0.03, 600), (0.7, 0.03, 600))
ONE = mixture((0.5, 0.05, 1200))


def test_valleys_lie_between_the_modes() -> None:
    cuts, depth = thoughts.thresholds(THREE)
    assert cuts == pytest.approx([0.35, 0.65], abs=0.06)
    assert depth > 0.5
    assert [len(thoughts.thresholds(x)[0]) for x in (ONE, TWO, THREE)] == [0, 1, 2]
    assert thoughts.thresholds(torch.full((50,), 0.5))[0] == []


def test_a_shallow_dent_parts_no_modes() -> None:
    assert thoughts.valleys([0, 1.0, 0.98, 1.0, 0]) == []
    assert thoughts.valleys([0, 1.0, 0.5, 1.0, 0.97, 0.99, 0]) == [2]
    assert thoughts.valleys([0, 0.5, 0.2, 1.0, 0.1, 0.6, 0]) == [2, 4]


def test_layers_with_three_modes_are_chosen_deepest_first() -> None:
    shallow = mixture((0.25, 0.055, 400), (0.5, 0.055, 400), (0.75, 0.055, 400), seed=1)
    samples = torch.stack([ONE, shallow, TWO, THREE])
    layers, cuts, notes = thoughts.choose(samples, 1)
    assert layers == [3]
    layers, cuts, notes = thoughts.choose(samples, 4)
    assert layers == [1, 3]
    assert cuts == pytest.approx([0.36, 0.64], abs=0.05)
    assert notes["modes_by_layer"] == [1, 3, 2, 3]
    with pytest.raises(ConfigError, match=r"no layer's sparsity has three modes .* --text"):
        thoughts.choose(samples[[0, 2]], 4)


def test_agreement_of_two_halves_is_one_for_equal_layers_and_chance_for_unrelated_ones() -> None:
    same = thoughts.judge(torch.stack([THREE, THREE]), Thoughts((0, 1), 0.35, 0.65, {}, {}))
    assert same["shares"] == pytest.approx({"execution": 1 / 3, "reasoning": 5 / 12, "transition": 1 / 4}, abs=0.01)
    assert same["kappa"] == 1.0
    order = torch.randperm(len(THREE), generator=torch.Generator().manual_seed(2))
    other = thoughts.judge(torch.stack([THREE, THREE[order]]), Thoughts((0, 1), 0.35, 0.65, {}, {}))
    assert abs(other["kappa"]) < 0.1


def test_sparsity_is_that_of_the_last_queries(tiny) -> None:
    ids = torch.randint(3, 250, (64,), generator=torch.Generator().manual_seed(0))
    found = thoughts.sparsities(tiny, ids, 8)
    assert found.shape == (3, 4)
    rows: list[torch.Tensor] = []

    def watch(number, q, k, v, scale):
        logits = q[0] @ k[0].repeat_interleave(q.shape[1] // k.shape[1], 0).transpose(-1, -2) * scale
        p = logits.masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf).softmax(-1)[:, 40:48]
        low = (p < 0.01 * p.amax(-1, keepdim=True)) & torch.ones(64, 64).tril().bool()[40:48]
        rows.append((low.sum(-1) / torch.arange(41, 49)).mean())

    with thoughts.watched(watch):
        tiny.body(input_ids=ids[None], use_cache=False)
    torch.testing.assert_close(found[:, 1], torch.stack(rows))


def test_a_file_is_written_and_read(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model's attention has no modes, so the sparsities are given."""
    draws = iter(range(1000))

    def sparsities(model, ids, window):
        part = torch.randperm(len(THREE), generator=torch.Generator().manual_seed(next(draws)))[:100]
        return torch.stack([ONE[part], THREE[part], THREE[part]])

    monkeypatch.setattr(thoughts, "sparsities", sparsities)
    settings = thoughts.Settings(texts=10, length=64, layers=2)
    found = thoughts.measure(tiny, ["some words " * 200], tmp_path / "t.json", settings)
    read = think_thresholds.load(str(tmp_path / "t.json"))
    assert list(read.layers) == found["layers"] == [1, 2]
    assert (read.low, read.high) == (found["low"], found["high"])
    read.check_model(tiny.body.config)
    assert found["held_out"]["windows"] == 200
    assert found["held_out"]["kappa"] == 1.0
    assert formula.thought(0.2, read.low, read.high) == formula.EXECUTION


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--model", "/nowhere"], "--model /nowhere is no model directory"),
        (["--texts", "0"], "--texts, --window and --layers must be at least 1"),
        (["--length", "40"], "--length must be at least twice --window (32), got 40"),
        (["--text", "/nowhere.txt"], "--text /nowhere.txt cannot be read"),
        (["--out", "/tmp"], "--out /tmp is a directory"),
    ],
)
def test_refused(assert_refused, tmp_path: Path, arguments: list[str], word: str) -> None:
    given = {"--model": str(tmp_path), "--out": str(tmp_path / "thoughts.json")} | {arguments[0]: arguments[1]}
    assert_refused(["train", "thoughts", *(x for pair in given.items() for x in pair)], word)
