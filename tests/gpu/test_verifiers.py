"""Verification rules on the device: the reference's decisions at full size, the law of a million steps, graphs."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from fixed_cache import FIXED_CACHE
from spec_batches import RULES, Tree, by_rule, chi_square, output_law, step

from vllm_ext.kernels import spec_random, spec_verify
from vllm_ext.kernels import spec_reference as ref
from vllm_ext.kernels.spec_rules import Rule
from vllm_ext.spec_decode.protocols import VerifyBatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

VOCAB, STEPS = 8, 1 << 20
SIGNIFICANCE = 1e-3 / 16
"""Over all tests of this file (Bonferroni)."""


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("sampled", [False, True])
def test_decisions_at_full_size(name: str, sampled: bool) -> None:
    """152k tokens, up to 8 drafts, greedy and random rows. fp32 sums differ in order: one in a hundred may differ."""
    batch = step(
        [8, 3, 0, 5, 8, 1, 7, 2] * 4, 151_936, sampled=sampled, temperature=[1.0, 0.0, 0.7, 1.3] * 8, near=0.9,
        spread=3.0, device="cuda",
    )  # fmt: skip
    tokens, count = spec_verify.verify(RULES[name], batch)
    first = batch.positions[batch.cu_rows[:-1].long()]
    numbers = spec_random.draws(batch.seeds, first, batch.max_drafts, 151_936)
    want, want_count = ref.emit(RULES[name], ref.dense(RULES[name], batch), *numbers)
    same = (tokens == want).all(1) & (count == want_count)
    assert same.float().mean() >= 0.96
    assert int(count.max()) > 1


def law_batch(target: Tree, draft: Tree, k: int, *, seed: int, lengths: torch.Tensor | None = None) -> VerifyBatch:
    """STEPS requests whose drafts are drawn from the draft tree; `lengths` cuts them."""
    generator = torch.Generator("cuda").manual_seed(seed)
    p_law, q_law = ([law.float().cuda() for law in tree.law] for tree in (target, draft))
    prefix = torch.zeros(STEPS, dtype=torch.long, device="cuda")
    drafts = torch.full((STEPS, k + 1), -1, dtype=torch.long, device="cuda")
    logits = torch.empty(STEPS, k + 1, VOCAB, device="cuda")
    draft_logits = torch.zeros(STEPS, k + 1, VOCAB, device="cuda")
    for t in range(k + 1):
        logits[:, t] = p_law[t][prefix].log()
        if t < k:
            law = q_law[t][prefix]
            draft_logits[:, t] = law.log()
            drafts[:, t] = torch.multinomial(law, 1, generator=generator)[:, 0]
            prefix = prefix * VOCAB + drafts[:, t]
    own = torch.full((STEPS,), k, device="cuda") if lengths is None else lengths
    keep = torch.arange(k + 1, device="cuda") <= own[:, None]
    bonus = torch.arange(k + 1, device="cuda") == own[:, None]
    drafts[bonus] = -1
    owner = torch.arange(STEPS, device="cuda")[:, None].expand(-1, k + 1)
    rows = torch.arange(int(keep.sum()), device="cuda")
    cu = torch.cat([torch.zeros(1, device="cuda", dtype=torch.long), (own + 1).cumsum(0)]).int()
    return VerifyBatch(
        logits[keep], drafts[keep], cu, owner[keep].int(), torch.ones(STEPS, device="cuda"),
        torch.randint(2**62, (STEPS,), generator=generator, device="cuda"), rows,
        draft_logits[keep], torch.where(bonus[keep], -1, rows), torch.ones(STEPS, device="cuda"), k,
    )  # fmt: skip


def first_two(rule: Rule, target: Tree, batch: VerifyBatch) -> torch.Tensor:
    """Cells of the first two tokens; where only one was emitted the target draws the second."""
    tokens, count = spec_verify.verify(rule, batch)
    generator = torch.Generator("cuda").manual_seed(99)
    second = torch.multinomial(target.law[1].float().cuda()[tokens[:, 0]], 1, generator=generator)[:, 0]
    return (tokens[:, 0] * VOCAB + torch.where(count > 1, tokens[:, 1], second)).cpu()


def trees(k: int, seed: int = 0) -> tuple[Tree, Tree]:
    return Tree(VOCAB, k + 1, seed), Tree(VOCAB, k, seed + 100)


@pytest.mark.parametrize("name", ["ratio", "hsd", "cactus", "cactus exact"])
def test_a_million_steps_follow_the_law(name: str) -> None:
    target, draft = trees(3)
    law = output_law(target, draft, 3, by_rule(RULES[name]))[0].view(VOCAB**2, -1).sum(1)
    if RULES[name].lossless:
        assert float((law - target.joint(2)).abs().max()) < 1e-12
    found = first_two(RULES[name], target, law_batch(target, draft, 3, seed=1))
    assert chi_square(found, law) > SIGNIFICANCE


@pytest.mark.parametrize("name", ["ratio", "hsd"])
@pytest.mark.parametrize("one_hot", [False, True])
def test_ragged_steps_follow_the_law(name: str, one_hot: bool) -> None:
    """Requests of 0 to 3 drafts in one batch, sampled or given."""
    target, draft = trees(3, seed=7)
    lengths = torch.arange(STEPS, device="cuda") % 4
    batch = law_batch(target, draft, 3, seed=2, lengths=lengths)
    if one_hot:
        batch = dataclasses.replace(batch, draft_logits=None, draft_row=None)
    assert chi_square(first_two(RULES[name], target, batch), target.joint(2)) > SIGNIFICANCE


def test_a_wrong_draft_law_is_noticed() -> None:
    """The power of these tests: a law that is off by a tenth in temperature fails."""
    target, draft = trees(3)
    batch = law_batch(target, draft, 3, seed=1)
    wrong = dataclasses.replace(batch, draft_temperature=batch.draft_temperature * 1.1)
    for name in ("ratio", "hsd"):
        assert chi_square(first_two(RULES[name], target, wrong), target.joint(2)) < 1e-6


def test_greedy_rows_equal_vllm() -> None:
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    requests, k, vocab = 64, 6, 49_152
    batch = step([k] * requests, vocab, sampled=True, temperature=[0.0] * requests, near=0.9, device="cuda")
    slots = torch.arange(requests, device="cuda", dtype=torch.int32)
    place = torch.arange(k + 1, device="cuda", dtype=torch.int32).repeat(requests)
    want, want_count = rejection_sample(
        batch.logits, None, batch.drafts.roll(1), batch.cu_rows, batch.positions, slots, batch.row_request, place,
        batch.temperature, batch.seeds, k,
    )  # fmt: skip
    used = torch.arange(k + 1, device="cuda") < want_count[:, None]
    for name in ("ratio", "hsd", "cactus"):
        tokens, count = spec_verify.verify(RULES[name], batch)
        assert torch.equal(count, want_count.to(count.dtype))
        assert torch.equal(torch.where(used, tokens, 0), torch.where(used, want, 0))
    assert int(want_count.max()) > 2


@pytest.mark.parametrize("name", RULES)
def test_captured_without_synchronisation(name: str) -> None:
    """One graph serves other logits and drafts; nothing waits for the device."""
    first = step([4] * 6, 5000, seed=1, near=0.9, device="cuda")
    other = step([4] * 6, 5000, seed=2, near=0.9, device="cuda")
    spec_verify.verify(RULES[name], first)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        spec_verify.verify(RULES[name], first)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, count = spec_verify.verify(RULES[name], first)
    for field in ("logits", "drafts", "seeds", "positions", "draft_logits"):
        getattr(first, field).copy_(getattr(other, field))
    graph.replay()
    want, want_count = spec_verify.verify(RULES[name], other)
    assert torch.equal(tokens, want)
    assert torch.equal(count, want_count)


def test_transport_on_the_device() -> None:
    """Global resolution in fp32: close to the optimum in ten steps, and the law kept."""
    from vllm_ext.kernels import spec_transport as transport

    generator = torch.Generator("cuda").manual_seed(0)
    count, vocab, k, n = 1 << 18, 8, 5, 2
    draw: Any = 1.5 * torch.randn(2, 1, vocab, generator=generator, device="cuda")
    p, q = draw[0].softmax(1), (0.5 * draw[0] + draw[1]).softmax(1)
    one = transport.solve(p, q, n, k)
    assert float((one.optimum - one.accepted).abs().max()) < 1e-3
    plan = transport.Plan(*(t.expand(count, *t.shape[1:]) for t in one))
    drafts = torch.multinomial(transport.truncated(q, k).expand(count, -1), n, replacement=True, generator=generator)
    noise = torch.empty(count, vocab, device="cuda").exponential_(generator=generator)
    u = torch.rand(count, generator=generator, device="cuda")
    token, accepted = transport.verify(plan, drafts, u, noise)
    assert chi_square(token.cpu(), p[0].cpu().double()) > SIGNIFICANCE
    assert abs(float(accepted.float().mean()) - float(one.accepted[0])) < 0.005


@pytest.mark.parametrize("rule", ["hsd", "cactus", "fly"])
def test_rules_in_an_engine(smollm2_dir: str, rule: str) -> None:
    """SmolLM2 under model runner V2: the rule decides, drafts are accepted, greedy and random requests together."""
    from vllm import SamplingParams

    import vllm_ext
    from vllm_ext.evaluation.engine import engine

    texts = [{"prompt_token_ids": list(range(50 + 7 * i, 90 + 7 * i)) * 3} for i in range(6)]
    params = [
        SamplingParams(temperature=0.0 if i % 2 else 0.8, max_tokens=48, ignore_eos=True, seed=i) for i in range(6)
    ]
    plugins = {"suffix_automaton": {"num_speculative_tokens": 6}, rule: {"window": 3} if rule == "fly" else {}}
    base = FIXED_CACHE | {"max_model_len": 1024, "enforce_eager": True, "disable_log_stats": False}
    with engine(smollm2_dir, base | vllm_ext.engine_args(*plugins, **plugins)) as llm:
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        assert type(runner.rejection_sampler).__name__ == "RuleSampler"
        out = llm.generate(texts, params, use_tqdm=False)
        found = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
        assert found["vllm:spec_decode_num_accepted_tokens"] > 0
        assert all(len(o.outputs[0].token_ids) == 48 for o in out)
