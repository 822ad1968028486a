"""Gate training: the target by definition, a falling loss, gradients to the gates alone, an interrupted run."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from vllm_ext.attention_backends import gate_file
from vllm_ext.evaluation import corpus
from vllm_ext.kernels.reference_gate import max_pooled_attention
from vllm_ext.options import ConfigError
from vllm_ext.training import seer

SMALL = seer.Settings(steps=60, batch=4, window=128, rows=64, page_size=16, lr=3e-3, warmup=3, passkeys=0.0, budget=2)
TEXT = [corpus.load(corpus.FILLER)[:20000]]


def test_target_is_the_largest_weight_of_a_block_and_group() -> None:
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 32, 8, generator=gen), torch.randn(1, 2, 32, 8, generator=gen)
    found = max_pooled_attention(q, k, torch.tensor([13, 31]), 8, 0.5)
    for head in range(2):
        for i, row in enumerate((13, 31)):
            weights = [(q[0, head * 2 + g, row] @ k[0, head, : row + 1].T * 0.5).softmax(-1) for g in range(2)]
            for block in range(4):
                part = [w[block * 8 : block * 8 + 8] for w in weights]
                want = max((p.max().item() for p in part if p.numel()), default=0.0)
                assert found[0, head, i, block].item() == pytest.approx(want, abs=1e-6)


def test_loss_falls_and_the_model_stays(tiny, tmp_path) -> None:
    before = {k: v.clone() for k, v in tiny.body.state_dict().items()}
    out = tmp_path / "gates.safetensors"
    found = seer.train(tiny, TEXT, out, SMALL, checkpoint=tmp_path / "run", windows=2)
    losses = [entry["kl"] for entry in found["history"]]
    before_training, after = found["held_out"]["before"], found["held_out"]["after"]
    assert losses[-1] < losses[0]
    assert after["kl"] < 0.85 * before_training["kl"]
    assert before_training["gate"] < after["gate"] < after["best"]
    assert all(torch.equal(v, before[k]) for k, v in tiny.body.state_dict().items())
    assert not (tmp_path / "run").exists()
    json.dumps(found)
    gate_file.read(out).check(tiny.shape, 16, [0, 1, 2])


def test_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path) -> None:
    short = dataclasses.replace(SMALL, steps=6, passkeys=0.5, window=2048, batch=1)
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    a = seer.train(tiny, TEXT, whole, short, checkpoint=tmp_path / "a", windows=0)
    seer.train(tiny, TEXT, parts, short, checkpoint=tmp_path / "b", windows=0, stop_after=3)
    assert not parts.exists()
    b = seer.train(tiny, TEXT, parts, short, checkpoint=tmp_path / "b", windows=0)
    assert whole.read_bytes() == parts.read_bytes()
    assert a["history"][-1] == b["history"][-1]


def test_checkpoint_of_other_settings_is_refused(tiny, tmp_path) -> None:
    seer.train(tiny, TEXT, tmp_path / "g", SMALL, checkpoint=tmp_path / "run", windows=0, stop_after=1)
    other = dataclasses.replace(SMALL, steps=31)
    with pytest.raises(ConfigError, match="--restart"):
        seer.train(tiny, TEXT, tmp_path / "g", other, checkpoint=tmp_path / "run", windows=0)


@pytest.mark.parametrize(
    ("change", "word"), [({"window": 100}, "--window"), ({"passkeys": 1.5}, "--passkeys"), ({"rows": 0}, "--rows")]
)
def test_wrong_settings(change, word) -> None:
    with pytest.raises(ConfigError, match=word):
        dataclasses.replace(SMALL, **change).check()


def test_too_little_text(tiny, tmp_path) -> None:
    with pytest.raises(ConfigError, match="--text"):
        seer.train(tiny, ["short"], tmp_path / "g", SMALL, checkpoint=tmp_path / "run", windows=0)
