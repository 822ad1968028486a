"""Retention gates learn to forget, and an interrupted training ends as an uninterrupted one."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from vllm_ext.kernels.kv_score_trim import capacity_loss, gated_bias
from vllm_ext.kv_managers import trim_gates
from vllm_ext.models import tiny_llama
from vllm_ext.options import ConfigError
from vllm_ext.training import trim
from vllm_ext.training.gated import GatedModel, Gates, output_embedding
from vllm_ext.training.model import load

SETTINGS = trim.Settings(steps=12, batch=2, window=96, passkeys=0, memory=16, inner=16, bias=6.0, lr=0.05, warmup=2)


class Letters:
    """A tokenizer of characters for a vocabulary of 128."""

    bos_token_id = None

    def __call__(self, texts, **_):
        encode = functools.partial(map, lambda c: min(ord(c), 127))
        many = not isinstance(texts, str)
        return {"input_ids": [list(encode(t)) for t in texts] if many else list(encode(texts))}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_llama(tmp_path_factory.mktemp("m") / "tiny", layers=2, vocab=128, heads=4, kv_heads=2, head_dim=16)
    return load(folder, device="cpu", dtype="float32", tokenizer=Letters())


TEXT = ["The quick brown fox jumps over the lazy dog; " * 60]


def run(model, out, settings=SETTINGS, **more):
    return trim.train(model, TEXT, out, settings, checkpoint=out.with_suffix(".checkpoint"), windows=0, **more)


def test_training_forgets_and_writes_gates(model, tmp_path):
    gated = GatedModel(model, Gates.of(model.body.config, SETTINGS.inner, SETTINGS.bias, SETTINGS.seed), 16)
    ids = torch.tensor(Letters()(TEXT)["input_ids"][0][:97])[None]
    before = trim.losses(gated, output_embedding(model), ids)["capacity"]
    results = run(model, tmp_path / "gates.safetensors")
    assert results["history"][-1]["capacity"] < 0.5 * before
    gates = trim_gates.load(tmp_path / "gates.safetensors")
    trim_gates.check_model(gates, model.body.config)
    assert gates.memory == 16
    assert gates.tensors["w1"].shape == (2, 16, 128)
    assert not (tmp_path / "gates.checkpoint").exists()


def test_interrupted_training_ends_the_same(model, tmp_path):
    run(model, tmp_path / "whole.safetensors")
    run(model, tmp_path / "parts.safetensors", stop_after=5)
    assert not (tmp_path / "parts.safetensors").exists()
    run(model, tmp_path / "parts.safetensors")
    whole, parts = (trim_gates.load(tmp_path / f"{n}.safetensors").tensors for n in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_batches_hold_passkeys_and_depend_on_the_step_alone(model):
    settings = dataclasses.replace(SETTINGS, window=1024, passkeys=1)
    tokens = torch.tensor(Letters()(TEXT * 4)["input_ids"]).flatten().to(torch.int32)
    first, again, other = (trim.batch_ids(model, tokens, settings, step) for step in (0, 0, 1))
    assert first.shape == (2, 1025)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with_passkeys = ["passkey" in "".join(map(chr, row)) for row in first.tolist()]
    assert with_passkeys == [False, True]


def test_checkpoint_of_other_settings_is_refused(model, tmp_path):
    out = tmp_path / "gates.safetensors"
    run(model, out, stop_after=3)
    with pytest.raises(ConfigError, match="another lr"):
        run(model, out, dataclasses.replace(SETTINGS, lr=0.1))


def test_gates_that_forget_nothing_leave_the_model_as_it_is(model):
    config = model.body.config
    gates = Gates.of(config, inner=8, bias=80.0, seed=0)
    gated = GatedModel(model, gates, memory=1000)
    ids = torch.randint(0, 128, (2, 50), generator=torch.Generator().manual_seed(0))
    hidden, capacity = gated.student(ids)
    torch.testing.assert_close(hidden, gated.teacher(ids), rtol=1e-4, atol=1e-4)
    assert capacity == 0
    found = trim.losses(gated, output_embedding(model), ids)
    assert found["kl"].abs() < 1e-5
    assert found["nll"] > 0


def test_a_forgotten_token_is_as_if_it_were_not_there(model):
    """log beta = -inf at one position is the mask of eviction: the output equals attention without that token."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 9, 8) for _ in range(3))
    log_beta = torch.zeros(1, 1, 9)
    log_beta[..., 3] = -1e9
    bias = gated_bias(log_beta)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    rest = [0, 1, 2, 4, 5, 6, 7, 8]
    for t in range(4, 9):
        past = [i for i in rest if i <= t]
        expected = torch.softmax(q[0, 0, t] @ k[0, 0, past].T / 8**0.5, -1) @ v[0, 0, past]
        torch.testing.assert_close(out[0, 0, t], expected)


def test_capacity_loss_by_hand():
    log_beta = torch.log(torch.tensor([[0.5, 1.0, 0.25]]))
    # held after each token: 1, 0.5 + 1, 0.25 + 1 + 1; with room for one: 0, 0.5 / 2, 1.25 / 3
    assert capacity_loss(gated_bias(log_beta), 1).item() == pytest.approx((0 + 0.25 + 1.25 / 3) / 3)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"window": 16}, "--window"), ({"passkeys": 3}, "--passkeys"), ({"steps": 0}, "--steps")],
)
def test_settings_that_train_nothing_are_refused(change, word):
    with pytest.raises(ConfigError, match=word):
        dataclasses.replace(SETTINGS, **change).check()


def test_gates_of_another_model_and_damaged_files_are_refused(model, tmp_path):
    config = model.body.config
    good = Gates.of(config, inner=8, bias=6.0, seed=0).export(config, 16)
    other = dataclasses.replace(good, model=good.model | {"hidden_size": 999})
    with pytest.raises(ConfigError, match="hidden_size 999"):
        trim_gates.check_model(other, config)
    other.save(tmp_path / "shape.safetensors")
    with pytest.raises(ConfigError, match=r"'w1' must have shape \(2, 8, 999\), found \(2, 8, 128\)"):
        trim_gates.load(tmp_path / "shape.safetensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        trim_gates.load(tmp_path / "missing.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"no gates")
    with pytest.raises(ConfigError, match="cannot be read"):
        trim_gates.load(tmp_path / "junk.safetensors")
