"""A tiny random model with a byte tokenizer, on one thread."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """A frozen Llama of 3 layers, 4 query and 2 KV heads of 32 channels."""
    from byte_tokenizer import byte_tokenizer

    from vllm_ext.models import tiny_llama
    from vllm_ext.training.model import load

    path = tiny_llama(
        tmp_path_factory.mktemp("models") / "tiny", layers=3, head_dim=32, hidden=64, intermediate=128, vocab=258
    )
    return load(path, device="cpu", tokenizer=byte_tokenizer())
