"""Upcycled models: copies compute what the dense model does; training parts the experts and saves what it trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vllm_ext.models import tiny_llama
from vllm_ext.moe.checkpoint import Checkpoint
from vllm_ext.moe.models import upcycle
from vllm_ext.training import upcycle as training


def tokenizer(parts: list[str], **_: object) -> dict[str, list[list[int]]]:
    """Every character is a token."""
    return {"input_ids": [[ord(c) % 128 for c in part] for part in parts]}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "tiny"
    return tiny_llama(folder, layers=2, heads=2, head_dim=32, hidden=64, intermediate=64, vocab=128)


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What transformers computes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_copies_compute_what_the_dense_model_does(dense: Path, tmp_path: Path) -> None:
    ids = torch.arange(60).remainder(50).view(2, 30)
    made = upcycle(dense, tmp_path / "copies", experts=4)
    assert torch.allclose(logits(made, ids), logits(dense, ids), atol=1e-4)
    noisy = upcycle(dense, tmp_path / "noisy", experts=4, noise=0.5)
    assert not torch.allclose(logits(noisy, ids), logits(dense, ids), atol=1e-2)
    first, second = Checkpoint(made).experts(0), Checkpoint(noisy).experts(0)
    assert torch.equal(first.gate[3], first.gate[0])
    assert torch.equal(second.gate[0], first.gate[0])


def test_training_parts_the_experts_and_saves_them(dense: Path, tmp_path: Path) -> None:
    """The loss falls on a text that repeats, and the written Mixtral computes what was trained, to bfloat16."""
    texts = ["the quick brown fox jumps over the lazy dog. " * 200]
    settings = training.Settings(experts=4, noise=0.0, steps=30, batch=4, window=32, lr=3e-3)
    out = tmp_path / "trained"
    result = training.train(dense, texts, out, settings, tmp_path / "c", torch.device("cpu"), tokenizer)
    assert result["held_out_loss"] < result["held_out_loss_before"] - 1
    assert not (tmp_path / "c").exists()
    experts = Checkpoint(out).experts(1)
    assert experts.gate.dtype == torch.bfloat16
    assert not torch.equal(experts.gate[0], experts.gate[1])
    model, blocks = training.upcycled(dense, settings, torch.device("cpu"))
    for layer, block in enumerate(blocks):
        saved = Checkpoint(out).experts(layer)
        for name in ("router", "gate", "up", "down"):
            getattr(block, name).data.copy_(getattr(saved, name))
    ids = torch.tensor([[ord(c) for c in "the quick brown fox"]])
    with torch.no_grad():
        want = model(input_ids=ids).logits
    # the rest of the model is saved in bfloat16 too
    assert torch.allclose(logits(out, ids), want, atol=0.1, rtol=0.05)


def test_wrong_models_and_counts_are_refused(dense: Path, tmp_path: Path, assert_refused: Callable) -> None:
    made = upcycle(dense, tmp_path / "made", experts=4)
    out = str(tmp_path / "out")
    assert_refused(["moe", "upcycle", str(made), out], "only a dense Llama")
    assert_refused(["moe", "upcycle", str(dense), out, "--experts", "2", "--top-k", "3"], "--top-k")
    assert_refused(["moe", "upcycle", str(dense), out, "--steps", "-1"], "--steps")
    assert_refused(["moe", "upcycle", str(dense), out, "--noise", "-1"], "--noise")
    assert_refused(["moe", "upcycle", str(dense), out, "--router", "-1"], "--router")
