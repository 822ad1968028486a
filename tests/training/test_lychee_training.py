"""Head identification: HardKuma by sampling, blending by definition, a falling density, an interrupted run."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from vllm_ext.attention_backends import role_file
from vllm_ext.evaluation import corpus
from vllm_ext.options import ConfigError
from vllm_ext.training import hard_kuma, lychee, text

SMALL = lychee.Settings(steps=30, batch=2, window=1400, labels=64, page_size=16, density=0.25, lr=0.2, penalty=4.0)
TEXT = [corpus.load(corpus.FILLER)[:20000]]


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0), (3.0, 0.7)])
def test_hard_kuma_closed_forms_equal_samples(alpha: float, beta: float) -> None:
    a, b = torch.tensor(alpha, dtype=torch.float64), torch.tensor(beta, dtype=torch.float64)
    u = torch.rand(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = hard_kuma.sample(a, b, u)
    assert (z > 0).double().mean().item() == pytest.approx(hard_kuma.nonzero(a, b).item(), abs=3e-3)
    x = (1 - (1 - u) ** (1 / b)) ** (1 / a)
    assert x.mean().item() == pytest.approx(hard_kuma.mean(a, b).item(), abs=3e-3)
    assert z.min() == 0
    assert z.max() == 1


def test_prompts_have_their_length_and_end_with_answers(tiny) -> None:
    ids = lychee.prompts(tiny, text.encode(tiny.tokenizer, TEXT), SMALL, 3)
    assert ids.shape[0] == 2
    assert ids.shape[1] <= SMALL.window
    assert torch.equal(ids, lychee.prompts(tiny, text.encode(tiny.tokenizer, TEXT), SMALL, 3))
    prompt = tiny.tokenizer.decode(ids[0].tolist())
    answer = prompt[-SMALL.labels :].split(" passkey is ")[1].split()[0]
    assert f"passkey is {answer}" in prompt[: -SMALL.labels]


def test_all_ones_is_the_dense_model(tiny) -> None:
    ids = lychee.prompts(tiny, text.encode(tiny.tokenizer, TEXT), SMALL, 0)
    context, target = lychee.context_and_target(tiny, ids, SMALL.labels)
    ones = torch.ones(2, 3, 2)
    with torch.no_grad():
        found = lychee.blended(tiny, ids, context, ones, SMALL)
        sparse = lychee.blended(tiny, ids, context, ones * torch.tensor([1.0, 0, 0])[None, :, None], SMALL)
    torch.testing.assert_close(found, target, atol=2e-4, rtol=1e-4)
    assert (sparse - target).abs().max() > 1e-2


def test_sparse_head_reads_the_inherited_pages_only() -> None:
    """One head, two layers: the second layer attends to the pages that the first layer's logits rank highest."""
    s = lychee.Settings(window=4096, labels=1, page_size=64, keep=0.25)
    gen = torch.Generator().manual_seed(1)
    n, d = 1024, 8
    k = [torch.randn(1, 1, n, d, generator=gen) for _ in range(2)]
    v = [torch.randn(1, 1, n, d, generator=gen) for _ in range(2)]
    q = [torch.randn(1, 2, 1, d, generator=gen) for _ in range(2)]
    blend = lychee.Blend([(k[i][:, :, :-1], v[i][:, :, :-1]) for i in range(2)], torch.tensor([[[1.0], [0.0]]]), s)
    blend(0, q[0], k[0][:, :, -1:], v[0][:, :, -1:], 0.3)
    found = blend(1, q[1], k[1][:, :, -1:], v[1][:, :, -1:], 0.3)
    logit = q[0][0, :, 0].mean(0) @ k[0][0, 0].T
    forced = {0, 1} | set(range((n - 256) // 64, n // 64))
    ranked = sorted(range(n // 64), key=lambda p: (p not in forced, -logit[p * 64 : p * 64 + 64].max().item()))
    keys = [i for p in sorted(ranked[:4]) for i in range(p * 64, p * 64 + 64)]
    assert len(forced) == 6  # more than the four kept: ties among forced pages are resolved by topk
    s = dataclasses.replace(s, keep=0.5)
    blend = lychee.Blend(blend.context, blend.z, s)
    blend(0, q[0], k[0][:, :, -1:], v[0][:, :, -1:], 0.3)
    found = blend(1, q[1], k[1][:, :, -1:], v[1][:, :, -1:], 0.3)
    keys = [i for p in sorted(ranked[:8]) for i in range(p * 64, p * 64 + 64)]
    want = (q[1][0, :, 0] @ k[1][0, 0, keys].T * 0.3).softmax(-1) @ v[1][0, 0, keys]
    torch.testing.assert_close(found[0, :, 0], want, atol=1e-5, rtol=1e-5)


def test_training_reaches_the_density(tiny, tmp_path) -> None:
    out = tmp_path / "roles.json"
    found = lychee.train(tiny, TEXT, out, SMALL, checkpoint=tmp_path / "run", batches=1)
    density = [entry["density"] for entry in found["history"]]
    assert density[-1] < 0.7 * density[0]
    assert not (tmp_path / "run").exists()
    assert found["held_out"]["first_layer_only"] > 0
    json.dumps(found)
    roles = role_file.read(out)
    roles.check(tiny.shape)
    assert all(roles.retrieval[0])
    assert sum(map(sum, roles.best(2)[1:])) == 2


def test_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path) -> None:
    short = dataclasses.replace(SMALL, steps=6)
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    lychee.train(tiny, TEXT, whole, short, checkpoint=tmp_path / "a", batches=0)
    lychee.train(tiny, TEXT, parts, short, checkpoint=tmp_path / "b", batches=0, stop_after=4)
    lychee.train(tiny, TEXT, parts, short, checkpoint=tmp_path / "b", batches=0)
    assert whole.read_text() == parts.read_text()


@pytest.mark.parametrize(
    ("change", "word"), [({"keep": 0.0}, "--keep"), ({"density": 1.0}, "--density"), ({"window": 100}, "--window")]
)
def test_wrong_settings(change, word) -> None:
    with pytest.raises(ConfigError, match=word):
        dataclasses.replace(SMALL, **change).check()
