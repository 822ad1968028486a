"""The real `vllm serve`: errors before weights are loaded, and one server with a plugin."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_ext.models import tiny_llama
from vllm_ext.serving import Server

VLLM = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve"]
SERVE = "import sys; sys.argv[:1] = ['vllm', 'serve']; from vllm.entrypoints.cli.main import main; main()"


def assert_refused(done: subprocess.CompletedProcess[str], sentence: str) -> None:
    """Exit code 2 and one line of ours, before anything is loaded."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("vllm-ext: ")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1
    assert sentence in errors[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert "Loading" not in done.stdout


def test_one_sentence_and_code_2_of_the_command() -> None:
    command = [*VLLM, "/no/such/model", "--skip-tokenizer-init", "--plugins", "quest"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert_refused(done, "model directory '/no/such/model' does not exist")


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (["--plugins", "quest", "--additional-config.vllm_ext.quest.dense_layers=[7]"], "quest.dense_layers names"),
        (["--plugins=quest", "--attention-backend", "CPU_ATTN"], "--attention-backend CPU_ATTN conflicts with"),
    ],
)
def test_one_sentence_and_code_2(forked: Callable[..., Any], model_dir: Path, tokens: list[str], sentence: str) -> None:
    assert_refused(forked(SERVE, model_dir, "--skip-tokenizer-init", *tokens), sentence)


def test_help_describes_the_flag(forked: Callable[..., Any]) -> None:
    done = forked(SERVE, "--help=plugins")
    assert done.returncode == 0
    for text in ("Plugins:", "--plugins [NAMES ...]", "quest", "vllm-ext list"):
        assert text in done.stdout


def write_tokenizer(path: Path) -> None:
    """A tokenizer of the words t0 .. t511."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(512)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t1", eos_token="t2", unk_token="t0").save_pretrained(
        path
    )


@pytest.mark.engine
def test_server_with_a_plugin(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    write_tokenizer(model)
    options = ["--max-model-len", "1024", "--max-num-seqs", "4", "--dtype", "float32", "--enforce-eager"]
    plugin = ["--plugins", "quest", "--additional-config.vllm_ext.quest.budget", "256"]
    with Server(model, [*plugin, *options], log=tmp_path / "log") as server:
        body = {"model": str(model), "prompt": [3 + i % 500 for i in range(700)], "max_tokens": 4, "ignore_eos": True}
        request = urllib.request.Request(
            f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=120) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
        deadline = time.monotonic() + 20
        while not (steps := server.metrics().get("vllm_ext:sparse_steps_total", 0)) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert steps > 0, "the server ran without the plugin"
    log = server.log()
    assert log.count("] vllm-ext 0") == 1, "the banner is printed once"
    assert log.count("--plugins quest stands for: --attention-backend VLLM_EXT_SPARSE --block-size 64") == 1
