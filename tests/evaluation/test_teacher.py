"""Teacher forcing: exactly the forced tokens, the right logits, and no difference between dense and dense."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vllm_ext.models import tiny_llama

LENGTHS = (200, 150, 33, 5, 77, 260)
FORCED = 20


@pytest.mark.engine
def test_forced_tokens_and_statistics(tmp_path, monkeypatch):
    """Mixed lengths, chunked prefill, fewer slots than requests; compared with a plain transformers run."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import SamplingParams

    from vllm_ext.evaluation.engine import engine
    from vllm_ext.evaluation.teacher import PROCESSOR, Tape, forced_params, use_tape

    model = tiny_llama(tmp_path / "model")
    rng = random.Random(0)
    prompts = [[rng.randrange(512) for _ in range(n)] for n in LENGTHS]
    forced = [[rng.randrange(512) for _ in range(FORCED)] for _ in prompts]
    arguments = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 128}
    arguments |= {"enforce_eager": True, "skip_tokenizer_init": True, "logits_processors": [PROCESSOR]}
    inputs = [{"prompt_token_ids": p} for p in prompts]
    tapes = []
    with engine(model, arguments) as llm:
        for recording in (True, False):
            params = [forced_params(f, len(p), key=str(i)) for i, (p, f) in enumerate(zip(prompts, forced))]
            with use_tape(Tape(tmp_path, recording)) as tape:
                outputs = llm.generate(inputs, params, use_tqdm=False)
            assert [list(o.outputs[0].token_ids) for o in outputs] == forced
            tapes.append(tape)
        mixed = [forced_params(forced[0], LENGTHS[0], free=4)]
        mixed.append(SamplingParams(temperature=0.0, max_tokens=4, detokenize=False, ignore_eos=True))
        first, free = llm.generate([inputs[0], inputs[1]], mixed, use_tqdm=False)
        assert list(first.outputs[0].token_ids[:FORCED]) == forced[0]
        continued = llm.generate([{"prompt_token_ids": prompts[0] + forced[0]}], mixed[1], use_tqdm=False)[0]
        assert list(first.outputs[0].token_ids[FORCED:]) == list(continued.outputs[0].token_ids)
        assert len(free.outputs[0].token_ids) == 4
    want = reference_nll(model, prompts, forced)
    for key, values in want.items():
        np.testing.assert_allclose(tapes[0].nll[key], values, atol=2e-4)
        assert np.abs(tapes[1].kl[key]).max() < 1e-6
        assert tapes[1].agree[key].min() == 1.0


def reference_nll(model, prompts, forced):
    """Negative log-likelihood of the forced tokens by transformers, all positions in one forward pass."""
    import torch
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = {}
    for i, (prompt, tail) in enumerate(zip(prompts, forced)):
        with torch.no_grad():
            logits = net(torch.tensor([prompt + tail])).logits[0, len(prompt) - 1 : -1].double()
        found[str(i)] = -torch.log_softmax(logits, -1).gather(1, torch.tensor(tail)[:, None])[:, 0].numpy()
    return found


def test_kl_is_the_divergence(tmp_path):
    """The tape's KL equals the definition, with -inf entries in the reference."""
    import torch

    from vllm_ext.evaluation.teacher import Tape, _Script

    torch.manual_seed(0)
    script = _Script([3, 1], 5, "a")
    dense, other = torch.randn(2, 40) * 3, torch.randn(2, 40) * 3
    dense[0, 7] = float("-inf")
    recorder, judge = Tape(tmp_path, True), Tape(tmp_path, False)
    for step in (0, 1):
        recorder.observe([script], [step], dense[step : step + 1])
    for file in recorder._files.values():
        file.flush()
    judge.observe([script, script], [0, 1], other)
    p, q = (torch.log_softmax(x.double(), -1) for x in (dense, other))
    want = torch.where(p.isinf(), 0.0, p.exp() * (p - q)).sum(-1)
    np.testing.assert_allclose(judge.kl["a"], want.numpy(), rtol=1e-9)
    assert judge.agree["a"].tolist() == (dense.argmax(-1) == other.argmax(-1)).double().tolist()


def test_check_forced_names_the_place():
    from vllm_ext.evaluation.tasks import check_forced

    check_forced([1, 2, 3, 9], [1, 2, 3])
    with pytest.raises(RuntimeError, match="token 1 of 3"):
        check_forced([1, 5, 3], [1, 2, 3])
