"""Fixtures of the engine tests: engines run in this process, one after the other, on one thread.

A tiny model gains nothing from a second thread, and where another process holds that core every small operation waits
a time slice for it: 13 times slower, measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # files of random gates and roles


@pytest.fixture(scope="module", autouse=True)
def _in_process() -> Iterator[None]:
    """Engine cores of this folder live in the test process; other tests get their environment back."""
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
