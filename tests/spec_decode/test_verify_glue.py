"""What the two model runners hand to a verification rule: the law of V1's path, the addresses of V2's."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from spec_batches import RULES, Tree, chi_square, step

from vllm_ext.kernels import spec_reference as ref
from vllm_ext.spec_decode.hsd import Hsd


def test_v1_path_follows_the_law() -> None:
    """Flat draft rows and a bonus token that vLLM drew: first two tokens of 6,000 requests."""
    from vllm_ext.spec_decode.verify_v1 import _by_rule

    vocab, k, count = 4, 2, 6000
    target, draft = Tree(vocab, k + 1, 5), Tree(vocab, k, 6)
    generator = torch.Generator().manual_seed(0)

    def draw(law: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(law, 1, generator=generator)[:, 0]

    first = draw(draft.law[0].expand(count, -1))
    second = draw(draft.law[1][first])
    p = torch.stack([target.law[0].expand(count, -1), target.law[1][first]], 1).float().flatten(0, 1)
    q = torch.stack([draft.law[0].expand(count, -1), draft.law[1][first]], 1).float().flatten(0, 1)
    bonus = draw(target.law[2][first * vocab + second])[:, None].int()
    sampling = SimpleNamespace(
        temperature=torch.ones(count), all_greedy=False, generators={}, vllm_ext_rule=Hsd().verifier(vocab, "cpu")
    )
    drafts = torch.stack([first, second], 1).flatten().int()
    ends = torch.arange(1, count + 1) * k
    out = _by_rule(None)(drafts, [k] * count, k, ends, q, p.log(), bonus, sampling)
    assert out.dtype == torch.int32
    whole = out[:, 2] >= 0
    assert whole.any()
    assert (out[whole, 2] == bonus[whole, 0]).all()
    following = torch.where(out[:, 1] >= 0, out[:, 1].long(), draw(target.law[1][out[:, 0].long()]))
    assert chi_square(out[:, 0].long() * vocab + following, target.joint(2)) > 1e-4


def test_v2_path_addresses_rows_and_slots() -> None:
    """Requests in scattered slots, drafts one row behind, draft laws by slot and step: as the flat step decides."""
    from vllm_ext.spec_decode.verify_v2 import RuleSampler

    lengths, vocab, k = [2, 3, 0, 1], 31, 3
    batch = step(lengths, vocab, near=0.9)
    slots = torch.tensor([5, 0, 3, 2])
    temperature, seeds = torch.zeros(6), torch.zeros(6, dtype=torch.int64)
    temperature[slots], seeds[slots] = batch.temperature, batch.seeds
    draft_logits, inputs = torch.randn(6, k, vocab), torch.zeros(len(batch.drafts), dtype=torch.int32)
    for r, n in enumerate(lengths):
        start = int(batch.cu_rows[r])
        for i in range(n):
            draft_logits[slots[r], i] = batch.draft_logits[start + i]
            inputs[start + 1 + i] = batch.drafts[start + i]
    sampler = RuleSampler.__new__(RuleSampler)
    sampler.rule, sampler.num_speculative_steps = Hsd().verifier(vocab, "cpu"), k
    states = SimpleNamespace(temperature=SimpleNamespace(gpu=temperature), seeds=SimpleNamespace(gpu=seeds))
    sampler.sampler = SimpleNamespace(apply_sampling_params=lambda logits, *rest: logits, sampling_states=states)
    owner = batch.row_request.long()
    place = torch.arange(len(owner)) - batch.cu_rows[owner].long()
    _, tokens, count = sampler._verify(
        batch.logits, draft_logits, inputs, batch.positions, batch.cu_rows, slots.int(), slots.numpy(),
        slots[owner].int(), place.int(), slots.numpy(), inputs,
    )  # fmt: skip
    want, want_count = ref.verify(RULES["hsd"], batch)
    assert torch.equal(tokens, want)
    assert torch.equal(count, want_count)
    assert int(count.max()) > 2


def test_sampling_parameters_of_drafts_on_a_cpu() -> None:
    from vllm_ext.spec_decode.glue import _expand_on_cpu

    expand = _expand_on_cpu(lambda: None)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    got = expand(torch.tensor([0.0, 0.5, 0.7]), ends, 5, replace_from=0, replace_to=1)
    assert torch.equal(got, torch.tensor([1.0, 1.0, 0.7, 0.7, 0.7]))
    assert expand(torch.tensor([20, 512, 3], dtype=torch.int32), ends, 5).tolist() == [20, 20, 3, 3, 3]
