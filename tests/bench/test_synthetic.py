"""Synthetic keys of a benchmark's prompts, and what a benchmark keeps of an earlier run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from vllm_ext import records
from vllm_ext.bench.synthetic import SPAN, synthetic_prompts
from vllm_ext.options import ConfigError

HEADS, SIZE, TOKENS = 2, 64, 8192


@pytest.fixture
def flash(monkeypatch):
    """FlashAttention's class with recorders instead of its kernels."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    calls = SimpleNamespace(forward=0, keys=[])

    def forward(self, layer, query, key, value, kv_cache, meta, output):
        calls.forward += 1
        return output

    def update(self, layer, key, value, kv_cache, slot_mapping):
        calls.keys.append(key)

    monkeypatch.setattr(FlashAttentionImpl, "forward", forward)
    monkeypatch.setattr(FlashAttentionImpl, "do_kv_cache_update", update)
    impl = object.__new__(FlashAttentionImpl)
    impl.scale = SIZE**-0.5
    return calls, impl


def step(impl, query, meta, key):
    output = torch.ones_like(query)
    slots = torch.arange(key.shape[0])
    impl.do_kv_cache_update(None, key, key, None, slots)
    return impl.forward(None, query, key, key, None, meta, output)


def test_logits_have_the_stated_spread_and_spans_share_half_of_it(flash):
    calls, impl = flash
    torch.manual_seed(0)
    query, key = 1e-4 * torch.randn(TOKENS, 4, SIZE), torch.zeros(TOKENS, HEADS, SIZE)
    prompt, decode = SimpleNamespace(max_query_len=TOKENS), SimpleNamespace(max_query_len=1)
    with synthetic_prompts(3.0, seed=1):
        step(impl, query, None, key)  # vLLM's profiling run: the model's own keys
        assert torch.equal(step(impl, query, prompt, key), torch.zeros_like(query))
        assert torch.equal(step(impl, query[:8], decode, key[:8]), torch.ones_like(query[:8]))
    assert calls.forward == 2
    before, drawn, after = calls.keys
    assert torch.equal(before, key)
    assert torch.equal(after, key[:8])
    # drawn with the mean length of the queries; the one that looks is about as long
    logits = (drawn[:, 0] @ query[7, 0]) * impl.scale
    spread = logits.std().item() * (query.norm(dim=-1).mean() / query[7, 0].norm()).item()
    assert spread == pytest.approx(3.0, rel=0.1)
    means = logits.view(-1, SPAN).mean(1)
    assert means.var().item() / logits.var().item() == pytest.approx(0.5, abs=0.12)
    top = logits.softmax(0).sort(descending=True).values.cumsum(0)
    assert int((top < 0.9).sum()) / TOKENS < 0.1


def test_other_backends_are_refused(flash):
    refused = pytest.raises(ConfigError, match="--peaked needs attention layers that run FlashAttention")
    with refused, synthetic_prompts(3.0):
        pass


def test_an_earlier_record_is_kept_only_if_it_was_made_alike(tmp_path):
    path = tmp_path / "decode.json"
    assert records.kept(tmp_path, "decode.json", {"steps": 4}) == []
    records.save(records.record("bench decode", [{"label": "dense"}], settings={"steps": 4}), path)
    assert records.kept(tmp_path, "decode.json", {"steps": 4}) == [{"label": "dense"}]
    with pytest.raises(ConfigError, match=r"--resume: .* has other settings"):
        records.kept(tmp_path, "decode.json", {"steps": 5})
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"device": "another"}))
    with pytest.raises(ConfigError, match="has other device"):
        records.kept(tmp_path, "decode.json", {"steps": 4})


@pytest.mark.parametrize("command", [["decode", "--case", "1x100"], ["serving", "--load", "1x64+8"]])
def test_resume_without_a_folder_is_refused(command, assert_refused):
    assert_refused(["bench", *command, "--shape", "tiny", "--resume"], "--out")


def test_a_failed_row_names_itself():
    from vllm_ext.evaluation.worker import fresh_process

    with pytest.raises(ConfigError, match=r"row 'mine' failed \(exit code 1\)"):
        fresh_process("vllm_ext.bench.decode:run_job", {"label": "mine"})
