"""Real engines on a CPU: greedy answers with speculation are those without, on both model runners."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import call
from noisy_model import noisy_copy

from vllm_ext.spec_decode.draft_length import SHAPE


def run(function: str, model: str, runner: str, *arguments: Any, timeout: int = 400) -> Any:
    """A function of `spec_engines` in a process of its own; `timeout` in seconds."""
    file = Path(__file__).with_name("spec_engines.py")
    return call(runner, file, function, model, runner, *arguments, limit=timeout)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random model."""
    from vllm_ext.models import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model", layers=2, vocab=256)


@pytest.fixture(scope="module")
def draft(tiny: Path) -> Path:
    """The model with some noise on its weights, so that some of its drafts are rejected; it names a mask token."""
    folder = noisy_copy(tiny)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pard_token": 3}))
    return folder


@pytest.fixture(scope="module")
def table(tiny: Path) -> Path:
    """A cost table under which drafts pay that are likely to survive."""
    from vllm.platforms import current_platform

    shape = {k: v for k, v in json.loads((tiny / "config.json").read_text()).items() if k in SHAPE}
    result = {"device": current_platform.get_device_name(), "model": shape, "drafter": "any", "context": [64]}
    result |= {"batch": [1, 8], "drafts": [0, 4], "seconds": [[[1.0, 2.6], [1.0, 2.6]]]}
    path = tiny.parent / "table.json"
    path.write_text(json.dumps({"results": [result]}))
    return path


@pytest.fixture(scope="module")
def stock(tiny: Path) -> Callable[[str], Any]:
    """Runner -> answers without speculation, once a runner."""
    return functools.cache(lambda runner: run("answers", str(tiny), runner, None, {"max_tokens": OUTPUT}, {})["tokens"])


OUTPUT = 16
TIGHT = {"num_gpu_blocks_override": 10, "block_size": 32, "enable_prefix_caching": True}
"""Pages for less than all running requests."""
CASES = {
    "v1-suffix": ("v1", {"suffix_automaton": {"num_speculative_tokens": 5}}, {}, {}),
    "v1-hedge-preempted": ("v1", {"hedge_spec": {"num_speculative_tokens": 4}}, {}, TIGHT),
    "v1-draft-preempted": ("v1", {"draft_model": {"num_speculative_tokens": 3}}, {}, TIGHT),
    "v1-pard": ("v1", {"pard": {"num_speculative_tokens": 3}}, {}, {}),
    "v1-draft-ragged": (
        "v1", {"draft_model": {"num_speculative_tokens": 4}, "cast": {"lengths": [0, 1, 2, 4], "scope": "request"}},
        {}, {},
    ),
    "v2-suffix": (
        "v2", {"suffix_automaton": {"num_speculative_tokens": 4, "shared": 2000}}, {"logprobs": 1}, {},
    ),
    "v2-hedge-fixed": (
        "v2", {"hedge_spec": {"num_speculative_tokens": 3, "model": True}, "fixed": {"lengths": [0, 2], "drafts": 2}},
        {}, {},
    ),
    "v2-hybrid-preempted": (
        "v2", {"hybrid": {"num_speculative_tokens": 3, "switch": 3, "parallel": True, "shared": 2000}}, {}, TIGHT,
    ),
    "v2-draft-ragged": (
        "v2", {"draft_model": {"num_speculative_tokens": 4}, "cast": {"lengths": [0, 1, 2, 4], "scope": "request"}},
        {}, {},
    ),
    "v2-pard-hsd": ("v2", {"pard": {"num_speculative_tokens": 3, "sampling": "probabilistic"}, "hsd": {}}, {}, {}),
}  # fmt: skip


@pytest.mark.engine
@pytest.mark.parametrize("case", CASES)
def test_greedy_identity(tiny, draft, table, stock, case):
    """Mixed lengths, chunked prompts, two rounds (the second finds cached prefixes), more requests than fit at once."""
    runner, plugins, sampling, extra = CASES[case]
    plugins = json.loads(json.dumps(plugins))
    for name, options in plugins.items():
        if name in ("hybrid", "pard", "draft_model") or "model" in options:
            options["model"] = str(draft)
        if name == "cast":
            options["table"] = str(table)
    found = run("answers", str(tiny), runner, plugins, sampling | {"max_tokens": OUTPUT}, extra)
    assert found["tokens"] == stock(runner)
    assert found["runner"].endswith("_model_runner") == (runner == "v1")  # V2: worker.cpu.model_runner
    assert found["drafted"] >= found["accepted"] > 0
    assert found["logprobs"] == [OUTPUT if "logprobs" in sampling else 0] * 7
    if "preempted" in case:
        assert found["preempted"] > 0
        assert found["cached"] > 0
    if "ragged" in case:  # a policy cuts drafts that all requests had as many of
        assert found["mixed"] > 0
        assert found["counts"] >= 3
    assert (found["scheduled"] is not None) == bool({"draft_model", "pard"} & set(plugins))
    if found["scheduled"] is not None:  # no look-ups: counted where vLLM counts
        assert found["scheduled"][1:3] == [found["drafted"], found["accepted"]]
        assert sum(found["scheduled"][3:]) == found["accepted"]
    if found["counted"] is not None:
        assert found["left"] <= 6
        assert 0 < found["counted"][2] <= found["accepted"]


@pytest.mark.engine
@pytest.mark.parametrize(("runner", "count", "prompt", "output"), [("v1", 4, 64, 32), ("v2", 4, 48, 16)])
def test_greedy_identity_of_a_trained_model(smollm2_dir, runner, count, prompt, output):
    """SmolLM2 in fp32, whose answers repeat themselves and their prompts."""
    found = run("real", smollm2_dir, runner, {"suffix_automaton": {}}, count, prompt, output)
    assert found["with"]["tokens"] == found["stock"]["tokens"]
    assert found["with"]["accepted"] > 0
