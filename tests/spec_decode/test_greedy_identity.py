"""Real engines on a CPU: greedy answers with speculation are those without, on both model runners."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(function: str, *arguments: Any) -> Any:
    """A function of `spec_engines` in a process of its own."""
    code = (
        "import importlib.util, json, sys, torch; torch.set_num_threads(1); "
        "spec = importlib.util.spec_from_file_location('spec_engines', sys.argv[1]); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "print('RESULT ' + json.dumps(getattr(module, sys.argv[2])(*json.loads(sys.argv[3]))), flush=True)"
    )
    command = [sys.executable, "-P", "-c", code, str(Path(__file__).with_name("spec_engines.py")), function]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [*command, json.dumps(arguments)], capture_output=True, text=True, timeout=400, env=environment, check=False
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(found[-1].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random model; as a draft model of itself it agrees with itself, and it names a mask token."""
    from vllm_ext.models import tiny_llama

    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_llama(folder, layers=2, vocab=256)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pard_token": 3}))
    return folder


CASES = {
    "v1-suffix": ("v1", {"suffix_automaton": {"num_speculative_tokens": 5}}, {}, {}),
    "v1-hedge-preempted": (
        "v1", {"hedge_spec": {"num_speculative_tokens": 4}}, {},
        {"num_gpu_blocks_override": 12, "block_size": 32, "enable_prefix_caching": True},
    ),
    "v2-suffix": (
        "v2", {"suffix_automaton": {"num_speculative_tokens": 4, "shared": 2000}}, {"logprobs": 1}, {},
    ),
    "v2-hedge-fixed": (
        "v2", {"hedge_spec": {"num_speculative_tokens": 3, "model": True}, "fixed": {"lengths": [0, 2], "drafts": 2}},
        {}, {},
    ),
    "v2-pard-hsd": ("v2", {"pard": {"num_speculative_tokens": 3, "sampling": "probabilistic"}, "hsd": {}}, {}, {}),
}  # fmt: skip


@pytest.mark.engine
@pytest.mark.parametrize("case", CASES)
def test_greedy_identity(tiny, case):
    """Mixed lengths, chunked prompts, two rounds (the second finds cached prefixes), more requests than fit at once."""
    runner, plugins, sampling, extra = CASES[case]
    plugins = json.loads(json.dumps(plugins))
    for name, options in plugins.items():
        if name in ("hybrid", "pard", "draft_model") or "model" in options:
            options["model"] = str(tiny)
    found = run("identity", str(tiny), runner, plugins, sampling | {"max_tokens": 24}, 7, extra)
    assert found["with"]["tokens"] == found["stock"]["tokens"]
    assert found["with"]["runner"].endswith("_model_runner") == (runner == "v1")  # V2: worker.cpu.model_runner
    assert found["with"]["drafted"] >= found["with"]["accepted"] > 0
    assert found["with"]["logprobs"] == found["stock"]["logprobs"]
    if "preempted" in case:
        assert found["with"]["preempted"] > 0
        assert found["with"]["cached"] > 0
    if found["with"]["counted"] is not None:
        assert found["with"]["left"] <= 6
        assert 0 < found["with"]["counted"][2] <= found["with"]["accepted"]
