"""Greedy identity at full size: every drafter on both model runners, SmolLM2 in fp32, 20 prompts of 128 tokens.

The suite does not collect this file (minutes a drafter on model runner V2, whose kernels Triton interprets). Name it
and, with -k, a drafter to run it; `-s` shows what was measured:

    python -P -m pytest tests/spec_decode/full_identity.py -s -k v2-pard

Prompts of 16 to 92 tokens share beginnings and are cut into chunks of up to 64 tokens beside decoding requests; four
sampled requests run among them. The pool holds fewer pages than six running requests need, so some are preempted;
prefix caching is on. The answers without speculation come from an engine with room for all, and are kept in pytest's
cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_greedy_identity import run

OUTPUT = 128
DRAFTS = {"v1": 7, "v2": 3}
"""Fewer on V2, where the interpreter takes milliseconds a draft."""
LAYERS = 27
"""Of SmolLM2's 30: without training, 40 to 70 % of the draft model's tokens are right."""
TIGHT = {"num_gpu_blocks_override": 22, "block_size": 32, "enable_prefix_caching": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v1-suffix_automaton": ("suffix_automaton", {}),
    "v1-ngram": ("ngram", {}),
    "v1-draft_model": ("draft_model", {"model": "DRAFT"}),
    "v1-pard": ("pard", {"model": "DRAFT"}),
    "v1-hedge_spec": ("hedge_spec", {}),
    "v2-suffix_automaton": ("suffix_automaton", {}),
    "v2-ngram": ("ngram", {}),
    "v2-draft_model": ("draft_model", {"model": "DRAFT"}),
    "v2-pard": ("pard", {"model": "DRAFT"}),
    "v2-hybrid": ("hybrid", {"model": "DRAFT"}),
    "v2-hybrid-parallel": ("hybrid", {"model": "DRAFT", "parallel": True}),
    "v2-hedge_spec": ("hedge_spec", {}),
    "v2-hedge_spec-model": ("hedge_spec", {"model": "DRAFT"}),
}


@pytest.fixture(scope="session")
def draft(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 less three layers, untrained; it names a mask token."""
    from transformers import AutoTokenizer

    from vllm_ext.training import pard

    folder = tmp_path_factory.mktemp("draft") / "model"
    model = pard.load_draft(Path(smollm2_dir), LAYERS, torch.device("cpu"))
    pard.save(model, AutoTokenizer.from_pretrained(smollm2_dir), model.config.vocab_size - 1, folder)
    return folder


@pytest.fixture(scope="session")
def stock(smollm2_dir: str, request: pytest.FixtureRequest) -> Callable[[str], dict[str, Any]]:
    """Runner -> what an engine without speculation and with pages for all requests wrote."""
    import vllm

    def answers(runner: str) -> dict[str, Any]:
        cache, name = request.config.cache, f"full_identity/{runner}"
        of = [vllm.__version__, torch.__version__, OUTPUT]
        kept = cache.get(name, {})
        if kept.get("of") != of:
            kept = {"of": of, "found": run("full", smollm2_dir, runner, None, OUTPUT, {"block_size": 32}, timeout=1500)}
            cache.set(name, kept)
            report(f"{runner}-none", kept["found"], "the reference")
        return kept["found"]

    return answers


def report(case: str, found: dict[str, Any], verdict: str) -> None:
    """One line of what an engine did."""
    print(
        f"\n{case}: {len(found['tokens'])} prompts x {OUTPUT} tokens: {verdict}; "
        f"{1 + found['accepted'] / found['decoded']:.2f} tokens a step "
        f"({found['accepted']:.0f} of {found['drafted']:.0f} drafts accepted), {found['preempted']:.0f} preemptions, "
        f"{found['cached']:.0f} tokens found in the prefix cache, {found['seconds']:.0f} s"
    )


def first_difference(model: str, prompt: list[int], expected: list[int], found: list[int]) -> str:
    """Where two answers part, and how far apart the model's logits of the two tokens are there."""
    from transformers import AutoModelForCausalLM

    at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    if at is None:
        return f"lengths {len(expected)} and {len(found)}"
    target = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = target(torch.tensor([prompt + expected[:at]])).logits[0, -1]
    gap = float(logits[expected[at]] - logits[found[at]])
    return f"token {at} is {found[at]}, not {expected[at]}; logit gap {gap:.2e}, best {int(logits.argmax())}"


@pytest.mark.engine
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES)
def test_every_drafter_writes_what_no_speculation_writes(smollm2_dir, draft, stock, case):
    runner = case[:2]
    name, options = CASES[case]
    options = json.loads(json.dumps(options).replace("DRAFT", str(draft))) | {"num_speculative_tokens": DRAFTS[runner]}
    expected = stock(runner)
    found = run("full", smollm2_dir, runner, {name: options}, OUTPUT, TIGHT, timeout=1500)
    differ = [i for i in range(20) if found["tokens"][i] != expected["tokens"][i]]
    report(case, found, f"prompts {differ} differ" if differ else "all equal")
    assert not differ, [
        first_difference(smollm2_dir, found["prompts"][i], expected["tokens"][i], found["tokens"][i]) for i in differ
    ]
    assert all(len(t) == OUTPUT for t in found["tokens"])
    assert found["runner"].endswith("_model_runner") == (runner == "v1")  # V2: worker.cpu.model_runner
    assert 0 < found["accepted"] < found["drafted"]
    assert found["preempted"] > 0
    assert found["cached"] > 0
