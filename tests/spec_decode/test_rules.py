"""Verification rules and length policies as plugins: options, refusals, banners, and the rule that options make."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_ext import catalogue
from vllm_ext.options import ConfigError, build

RULES = ("hsd", "cactus", "fly")


def plugin(name: str, **options: Any) -> Any:
    return build(catalogue.get(name).cls(), name, options)


def config(drafts: int = 8, **changes: Any) -> Any:
    """As much of a VllmConfig as the checks read."""
    spec = {"num_speculative_tokens": drafts, "rejection_sample_method": "standard", "draft_sample_method": "greedy"}
    return SimpleNamespace(
        speculative_config=SimpleNamespace(**spec | changes, method="ngram_gpu"),
        model_config=SimpleNamespace(runner_type="generate", model="m"),
        use_v2_model_runner=True,
        scheduler_config=SimpleNamespace(async_scheduling=True),
        parallel_config=SimpleNamespace(data_parallel_size=1, pipeline_parallel_size=1),
        additional_config={},
    )


@pytest.mark.parametrize("name", RULES)
def test_rules_exclude_each_other_and_say_what_they_are(name: str) -> None:
    entry = catalogue.get(name)
    assert set(entry.conflicts) == set(RULES) - {name}
    assert entry.kind == plugin(name).part == "verifier"
    assert ("lossy" in entry.summary) == (not plugin(name).lossless)
    lines = plugin(name).banner(config(16))
    assert lines["output law"].startswith("the target model" if plugin(name).lossless else "LOSSY")


@pytest.mark.parametrize("name", RULES)
def test_plugin_and_rule_agree(name: str) -> None:
    rule = plugin(name).verifier(100, torch.device("cpu"))
    assert rule.lossless == plugin(name).lossless
    assert rule.needs_draft_law == plugin(name).needs_draft_law
    assert rule.rule.kind == name


def test_options_reach_the_rule() -> None:
    rule = plugin("cactus", delta=0.5, enforce=True).verifier(9, None).rule
    assert (rule.delta, rule.exact, rule.lossless) == (0.5, True, False)
    assert plugin("cactus", delta=0).verifier(9, None).lossless
    rule = plugin("fly", theta=0.2, window=3, entropy="top3").verifier(9, None).rule
    assert (rule.theta, rule.window, rule.entropy) == (0.2, 3, "top3")


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("cactus", {"delta": -0.1}, "cactus.delta must be at least 0"),
        ("cactus", {"delta": 11}, "cactus.delta must be at most 10"),
        ("cactus", {"delta": "much"}, "cactus.delta must be of type float"),
        ("fly", {"theta": -1}, "fly.theta must be at least 0"),
        ("fly", {"theta": 1.05}, "entropy=normalized is never above 1.00"),
        ("fly", {"theta": 1.1, "entropy": "top3"}, "entropy=top3 is never above 1.10"),
        ("fly", {"window": 40}, "fly.window must be at most 31"),
        ("fly", {"entropy": "full"}, "fly.entropy must be one of"),
        ("hsd", {"delta": 1}, "plugin 'hsd' has no option 'delta'"),
        ("fixed", {"drafts": 3}, "not in fixed.lengths"),
        ("cast", {"margin": 0.9}, "cast.margin must be at least 1"),
        ("cast", {"probing": 0.5}, "cast.probing must be at most 0.1"),
        ("cast", {"width": 4}, "plugin 'cast' has no option 'width': vLLM verifies one chain of drafts a request"),
        ("hsd", {"drafts_per_position": 2}, "one chain of drafts a request, no tree; leave it out."),
        ("suffix_automaton", {"tree": True}, "plugin 'suffix_automaton' has no option 'tree': vLLM verifies one chain"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError) as error:
        plugin(name, **options)
    assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "drafts", "word"),
    [
        ("fly", {}, 6, "raise the drafter's num_speculative_tokens"),
        ("fixed", {"drafts": 7}, 4, "the drafter makes at most 4"),
        ("cast", {}, 8, "cast.table names no file"),
    ],
)
def test_what_cannot_work_is_refused(name: str, options: dict[str, Any], drafts: int, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        plugin(name, **options).check(config(drafts))


@pytest.mark.parametrize("name", RULES)
def test_rules_without_drafts_or_beside_others_are_refused(name: str) -> None:
    nothing = config()
    nothing.speculative_config = None
    with pytest.raises(ConfigError, match="add a drafter"):
        plugin(name).check(nothing)
    with pytest.raises(ConfigError, match="drop one of them"):
        plugin(name).check(config(16, rejection_sample_method="block"))


@pytest.mark.parametrize(
    ("drafter", "remedy"),
    [("suffix_automaton", "use a drafter with probabilities"), ("draft_model", "set draft_model.sampling to prob")],
)
def test_a_rule_that_needs_probabilities_is_refused_without_them(drafter: str, remedy: str) -> None:
    """No rule of the package is void without them; the protocol lets one say so."""

    class Needy(catalogue.get("hsd").cls()):  # type: ignore[misc]
        needs_draft_law = True
        runners = ("v2",)

    cfg = config(16)
    cfg.additional_config = {"vllm_ext": {drafter: {"num_speculative_tokens": 16}}}
    with pytest.raises(ConfigError, match=f"needs draft probabilities, which {drafter} does not give; {remedy}"):
        Needy().check(cfg)
    Needy().check(config(16, draft_sample_method="probabilistic"))
    cfg.use_v2_model_runner = False
    with pytest.raises(ConfigError, match="not available on model runner v1; use v2"):
        Needy().check(cfg)


def test_hsd_says_when_it_gains_nothing() -> None:
    assert "token-wise" in plugin("hsd").banner(config())["gain"]
    assert "gain" not in plugin("hsd").banner(config(draft_sample_method="probabilistic"))
