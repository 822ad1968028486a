"""PARD's packed training sequence is the same computation as one forward for each subtask."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from vllm_ext.options import ConfigError
from vllm_ext.training import pard


@pytest.fixture(scope="module")
def model():
    """A small random model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def packing(settings: pard.Settings) -> tuple[list[torch.Tensor], pard.Packed]:
    kept = pard.anchors(settings.window, settings, torch.Generator().manual_seed(0))
    return kept, pard.Packed.of(kept)


def test_anchors_are_nested():
    settings = pard.Settings(drafts=8, window=200)
    kept, packed = packing(settings)
    assert len(kept) == 8
    for before, after in itertools.pairwise(kept):
        assert set(after.tolist()) <= set(before.tolist())
    assert len(kept[1]) == 140
    assert len(kept[-1]) == 40  # 0.7 ** 7 is below the least share, 0.2
    assert len(packed.anchor) == sum(map(len, kept))


def test_packed_forward_equals_separate_forwards(model):
    settings = pard.Settings(drafts=4, window=32)
    _, packed = packing(settings)
    tokens, mask_token = torch.randint(0, 63, (2, 32), generator=torch.Generator().manual_seed(1)), 63
    real = packed.subtask == 1
    bias = torch.zeros(1, 1, len(real), len(real)).masked_fill_(~packed.mask(), torch.finfo(torch.float32).min)
    with torch.no_grad():
        ids = torch.where(real, tokens[:, packed.anchor], mask_token)
        together = model(input_ids=ids, position_ids=packed.positions[None].expand(2, -1), attention_mask=bias).logits
        for n in range(0, len(real), 3):
            anchor, subtask = int(packed.anchor[n]), int(packed.subtask[n])
            masks = torch.full((2, subtask - 1), mask_token)
            alone = model(input_ids=torch.cat([tokens[:, : anchor + 1], masks], 1)).logits[:, -1]
            torch.testing.assert_close(together[:, n], alone, atol=1e-4, rtol=0)


def test_training_learns_and_resumes(model, tmp_path, monkeypatch):
    """The result names its mask token and has learnt something; an interrupted run ends with the same weights."""
    from safetensors.torch import load_file

    from vllm_ext.training import loop, text

    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)  # a teacher with opinions
    model.save_pretrained(tmp_path / "target")
    tokens = torch.arange(60, dtype=torch.int32).repeat(40)
    monkeypatch.setattr(text, "encode", lambda tokenizer, texts: tokens)
    tokenizer = type("Tokenizer", (), {"save_pretrained": lambda *a: None})()
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda path: tokenizer)
    settings = pard.Settings(layers=2, drafts=3, steps=12, batch=2, window=32, lr=3e-3)

    def train(name: str) -> dict:
        target, out = tmp_path / "target", tmp_path / name
        return pard.train(target, target, ["x"], out, settings, tmp_path / f"{name}.run", torch.device("cpu"))

    found = train("whole")
    fit = loop.Run.fit

    def interrupted(run):
        fit(run, stop_after=5)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Run, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("parts")
    monkeypatch.setattr(loop.Run, "fit", fit)
    train("parts")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (config["pard_token"], config["num_hidden_layers"]) == (63, 2)
    assert found["history"][-1]["loss"] < found["history"][0]["loss"]
    assert len(found["held_out_agreement"]) == 3
    whole, parts = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "parts"))
    for name in whole:
        assert torch.equal(whole[name], parts[name])
    assert not (tmp_path / "parts.run").exists()


def test_wrong_settings():
    with pytest.raises(ConfigError, match="--drafts"):
        pard.Settings(drafts=1).check()
    with pytest.raises(ConfigError, match="--keep"):
        pard.Settings(keep=0.1).check()
