"""The attention-output error of eviction: its definition, its bounds, and the layers' shares measured with it."""

from __future__ import annotations

import json

import pytest
import torch

from vllm_ext.cli.kv_error_cmd import candidates
from vllm_ext.evaluation import attention_error
from vllm_ext.evaluation.attention_error import Candidate
from vllm_ext.kv_managers import layer_profile
from vllm_ext.kv_managers.defensive_kv import DefensiveKV
from vllm_ext.kv_managers.layer_defensive_kv import LayerDefensiveKV
from vllm_ext.kv_managers.random_kv import RandomKV
from vllm_ext.kv_managers.snapkv import SnapKV
from vllm_ext.kv_managers.streaming_llm import StreamingLLM
from vllm_ext.kv_managers.trim_kv import TrimKV
from vllm_ext.models import tiny_llama
from vllm_ext.options import ConfigError
from vllm_ext.training import layers
from vllm_ext.training.gated import Gates
from vllm_ext.training.model import load, watched

PROMPT, TOTAL = 256, 300


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_llama(tmp_path_factory.mktemp("m") / "tiny", layers=4, vocab=128, heads=4, kv_heads=2, head_dim=16)
    return load(folder, device="cpu", dtype="float32", tokenizer=object())


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, 128, (TOTAL,), generator=torch.Generator().manual_seed(0)).tolist()


def rows(model, text, *methods):
    listed = [Candidate(str(i), m, 0.25) for i, m in enumerate(methods)]
    return attention_error.measure(model, listed, [text], PROMPT, lambda *_: None)


def test_the_full_output_is_the_models_own(model, text):
    seen, found = {}, []
    hooks = [
        layer.self_attn.o_proj.register_forward_hook(lambda m, a, out, i=i: seen.update({i: out[0]}))
        for i, layer in enumerate(model.body.layers)
    ]

    def watch(number, q, k, v, scale):
        weight = attention_error.output_weight(model, number)
        layer = attention_error.Layer(number, q[0].transpose(0, 1), k[0], v[0], weight, scale, None)
        found.append(layer.outputs(PROMPT, None))

    with torch.no_grad(), watched(watch):
        model.body(input_ids=torch.tensor([text]), use_cache=False)
    for hook in hooks:
        hook.remove()
    for i, out in enumerate(found):
        torch.testing.assert_close(out, seen[i][PROMPT:], rtol=1e-4, atol=1e-4)


def test_keeping_everything_costs_nothing_and_the_oracle_is_best(model, text):
    gates = TrimKV(budget=64, stride=32, gates="")
    everything, snap, noise, recent, best = rows(
        model,
        text,
        SnapKV(ratio=1.0),
        SnapKV(ratio=0.25),
        RandomKV(ratio=0.25),
        StreamingLLM(budget=64, stride=32),
        None,
    )
    assert gates.trigger == "streaming"
    assert everything["mean"] < 1e-6
    assert best["kept"] == snap["kept"] == noise["kept"] == recent["kept"] == 64
    assert 0 < best["mean"] < snap["mean"]
    assert snap["mean"] < noise["mean"]


def test_streaming_methods_evict_while_they_read(model, text, tmp_path):
    config = model.body.config
    Gates.of(config, inner=8, bias=3.0, seed=1).export(config, 64).save(tmp_path / "gates.safetensors")
    method = TrimKV(budget=64, stride=32, window=8, sinks=2, gates=str(tmp_path / "gates.safetensors"))
    (row,) = rows(model, text, method)
    assert row["kept"] == 64
    assert 0 < row["mean"] < 2
    layer = attention_error.Layer(0, *(torch.randn(s) for s in ((TOTAL, 4, 16), (2, TOTAL, 16), (2, TOTAL, 16))),
                                  torch.zeros(4, 16, 8), 1.0, -torch.rand(2, TOTAL))  # fmt: skip
    kept = attention_error.keep(method, layer, PROMPT, 1.0)
    assert kept.shape == (2, 64)
    assert (kept.diff(dim=-1) > 0).all()
    assert kept[:, :2].tolist() == [[0, 1]] * 2
    assert kept[:, -8:].tolist() == [list(range(PROMPT - 8, PROMPT))] * 2


def test_layer_shares_are_measured_sorted_and_read_back(model, text, tmp_path):
    method, out = DefensiveKV(ratio=0.25, mass=0.0), tmp_path / "layers.json"
    profile = layers.measure(model, method, [text], 2, out, lambda *_: None)
    assert len(set(profile.shares)) == 2
    assert sum(profile.shares) / 4 == pytest.approx(1, abs=1e-3)
    assert sum(profile.notes["needs"]) == pytest.approx(4 * method.budget_for(TOTAL), rel=0.02)
    largest = max(range(4), key=lambda i: profile.notes["needs"][i])
    assert profile.shares[largest] == max(profile.shares)
    shares = LayerDefensiveKV(ratio=0.25, profile=str(out))
    assert shares.layer_shares(4) == list(profile.shares)
    layer_profile.load(out).check_model(model.body.config)
    with pytest.raises(ConfigError, match="4 layers, the model has 6"):
        shares.layer_shares(6)


def test_classes_of_equal_size():
    assert layer_profile.classes([4, 1, 3, 2], 2) == (1.4, 0.6, 1.4, 0.6)
    assert layer_profile.classes([4, 1, 3, 2], 1) == (1.0,) * 4
    with pytest.raises(ConfigError, match="--classes must divide the 4 layers, got 3"):
        layer_profile.classes([1, 2, 3, 4], 3)


def test_bad_profiles_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="profile is empty"):
        LayerDefensiveKV().layer_shares(4)
    path = tmp_path / "layers.json"
    for text in ("not json", json.dumps({"format": "other"}), json.dumps([1])):
        path.write_text(text)
        with pytest.raises(ConfigError, match="is no layer profile"):
            layer_profile.load(path)


def test_command_rows_are_kv_plugins_with_the_asked_budget():
    found = candidates(["snapkv", "streaming_llm"], [0.5, 0.1], 2048)
    assert [c.label for c in found] == ["snapkv"] * 2 + ["streaming_llm"] * 2 + ["oracle"] * 2
    assert [c.method.budget_for(2048) for c in found[:4]] == [1024, 224, 1024, 192]
    with pytest.raises(ConfigError, match="'quest' must be one plugin of kind kv"):
        candidates(["quest"], [0.5], 2048)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--length", "1000"], "--length must be a multiple of random_kv.block_size (32), got 1000"),
        (["--plugins", "snapkv:scope=model"], "snapkv.scope model"),
        (["--ratio", "0"], "--ratio must be above 0"),
        (["--positions", "0"], "--positions"),
    ],
)
def test_bad_arguments_of_the_command(assert_refused, arguments, word):
    assert_refused(["kv-error", "nowhere", *arguments], word)
