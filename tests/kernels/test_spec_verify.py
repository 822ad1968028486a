"""The verification kernels (Triton's interpreter where there is no GPU) against their reference, number by number."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from spec_batches import RULES, chi_square, step
from torch import Tensor

from vllm_ext.kernels import spec_random, spec_verify
from vllm_ext.kernels import spec_reference as ref
from vllm_ext.kernels.spec_rules import Rule
from vllm_ext.spec_decode.protocols import VerifyBatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [0, 1, 3, 6, 4, 2]
MIXED = [1.0, 0.0, 0.7, 1.3, 0.0, 1.0]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that the interpreter gets through quickly."""
    if DEVICE == "cpu":
        monkeypatch.setattr(spec_verify, "BLOCK", 64)


def expected(rule: Rule, batch: VerifyBatch) -> tuple[Tensor, Tensor]:
    """The reference with the numbers that the kernels draw."""
    first = batch.positions[batch.cu_rows[:-1].long()]
    numbers = spec_random.draws(batch.seeds, first, max(batch.max_drafts, 1), batch.logits.shape[1])
    tokens, count = ref.emit(rule, ref.dense(rule, batch), *numbers)
    return tokens[:, : batch.max_drafts + 1], count


def check(rule: Rule, batch: VerifyBatch) -> Tensor:
    """Kernels and reference agree; the number of emitted tokens."""
    tokens, count = spec_verify.verify(rule, batch)
    want, want_count = expected(rule, batch)
    assert torch.equal(count, want_count)
    assert torch.equal(tokens, want)
    return count


def altered(batch: VerifyBatch, **fields: Any) -> VerifyBatch:
    return dataclasses.replace(batch, **fields)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("sampled", [False, True])
def test_kernels_equal_the_reference(name: str, sampled: bool) -> None:
    batch = step(LENGTHS, 37, sampled=sampled, temperature=MIXED, device=DEVICE, near=0.9)
    assert int(check(RULES[name], batch).max()) > 1


@pytest.mark.parametrize("name", RULES)
def test_a_step_without_drafts(name: str) -> None:
    """K = 0: every request gets one token of the target's law, on the device and on the host."""
    batch = step([0, 0, 0], 37, temperature=[1.0, 0.0, 0.7], device=DEVICE)
    batch = altered(batch, max_drafts=0)
    assert check(RULES[name], batch).tolist() == [1, 1, 1]
    tokens, count = ref.verify(RULES[name], batch)
    assert tokens.shape == (3, 1)
    assert count.tolist() == [1, 1, 1]
    assert int(tokens[1, 0]) == int(batch.logits[1].argmax())


@pytest.mark.parametrize("name", ["hsd", "cactus", "fly", "fly top3"])
def test_several_blocks_of_vocabulary(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec_verify, "BLOCK", 32)
    batch = step([4, 2, 5], 101, sampled=True, temperature=[1.0, 0.0, 0.8], device=DEVICE, near=0.8)
    check(RULES[name], batch)


@pytest.mark.parametrize("name", ["hsd", "cactus"])
def test_half_precision_and_truncated_laws(name: str) -> None:
    """bfloat16 logits, and a target that top-k has cut to three tokens."""
    batch = step(LENGTHS, 64, sampled=True, temperature=MIXED, dtype=torch.bfloat16, device=DEVICE)
    check(RULES[name], batch)
    least = batch.logits.float().topk(3, 1).values[:, -1:]
    cut = torch.where(batch.logits.float() >= least, batch.logits.float(), float("-inf"))
    check(RULES[name], altered(batch, logits=cut))


@pytest.mark.parametrize("name", RULES)
def test_rejected_in_advance(name: str) -> None:
    """-1: never accepted. A sampled one leaves the residual law, a deterministic one ends the draft."""
    for sampled in (False, True):
        batch = step(
            [4, 4, 4, 3], 29, seed=5, sampled=sampled, temperature=[1.0, 1.0, 0.0, 1.0], near=1.0, device=DEVICE
        )
        drafts = batch.drafts.clone()
        drafts[batch.cu_rows[:-1].long() + 2] = -1
        count = check(RULES[name], altered(batch, drafts=drafts))
        assert int(count.max()) <= 3


def test_a_sampled_draft_that_is_rejected_in_advance_leaves_the_residual() -> None:
    """p = (.9, .1, 0), q = (.1, .1, .8): where the third token was drafted, only the first can follow."""
    requests = 20
    p = torch.tensor([0.9, 0.1, 0.0]).log()
    batch = step([1] * requests, 3, sampled=True, device=DEVICE)
    logits = p.expand(2 * requests, 3).contiguous().to(DEVICE)
    draft_logits = torch.tensor([0.1, 0.1, 0.8]).log().expand(2 * requests, 3).contiguous().to(DEVICE)
    gone = torch.full_like(batch.drafts, -1)
    for kind in ("ratio", "hsd"):
        tokens, count = spec_verify.verify(
            Rule(kind), altered(batch, logits=logits, draft_logits=draft_logits, drafts=gone)
        )
        assert (count == 1).all()
        assert (tokens[:, 0] == 0).all()


def test_a_draft_vocabulary_without_the_padding_of_the_target() -> None:
    batch = step([3, 4, 2], 40, sampled=True, near=0.8, device=DEVICE)
    assert batch.draft_logits is not None
    narrow = altered(batch, draft_logits=batch.draft_logits[:, :33].contiguous(), drafts=batch.drafts.clamp(max=32))
    for name in ("ratio", "hsd", "cactus"):
        check(RULES[name], narrow)


@pytest.mark.parametrize("name", ["ratio", "hsd"])
def test_rows_of_one_hot_and_sampled_drafts_mix(name: str) -> None:
    batch = step([5, 5, 5], 19, seed=2, sampled=True, near=0.9, device=DEVICE)
    assert batch.draft_row is not None
    draft_row = batch.draft_row.clone()
    draft_row[::2] = -1
    check(RULES[name], altered(batch, draft_row=draft_row))
    none = altered(batch, draft_row=torch.full_like(draft_row, -1))
    plain = altered(batch, draft_row=None, draft_logits=None)
    for a, b in zip(spec_verify.verify(RULES[name], none), spec_verify.verify(RULES[name], plain)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["ratio", "hsd", "cactus"])
def test_greedy_rows_follow_the_argmax(name: str) -> None:
    lengths = [3, 5, 0, 4]
    batch = step(lengths, 23, sampled=True, temperature=[0.0] * 4, near=0.7, device=DEVICE)
    tokens, count = spec_verify.verify(RULES[name], batch)
    best = batch.logits.argmax(1).tolist()
    start = batch.cu_rows.tolist()
    for r, n in enumerate(lengths):
        want = []
        for i in range(n + 1):
            want.append(best[start[r] + i])
            if i == n or batch.drafts[start[r] + i] != best[start[r] + i]:
                break
        assert tokens[r, : int(count[r])].tolist() == want


def test_order_of_requests_does_not_matter() -> None:
    """The numbers belong to seed and position, not to the place in the batch."""
    lengths = [2, 5, 0, 3]
    batch = step(lengths, 31, seed=9, near=0.8, device=DEVICE)
    rows = [torch.arange(int(a), int(b)) for a, b in zip(batch.cu_rows[:-1], batch.cu_rows[1:])]
    order = [3, 0, 2, 1]
    sizes = torch.tensor([lengths[i] + 1 for i in order])
    to = torch.cat([rows[i] for i in order]).to(DEVICE)
    assert batch.draft_row is not None
    moved = altered(
        batch, logits=batch.logits[to], drafts=batch.drafts[to], positions=batch.positions[to],
        draft_row=batch.draft_row[to], seeds=batch.seeds[order], temperature=batch.temperature[order],
        draft_temperature=batch.draft_temperature[order],
        cu_rows=torch.cat([torch.zeros(1), sizes.cumsum(0)]).int().to(DEVICE),
        row_request=torch.repeat_interleave(torch.arange(4), sizes).int().to(DEVICE),
    )  # fmt: skip
    for rule in (RULES["hsd"], RULES["cactus"]):
        tokens, count = spec_verify.verify(rule, batch)
        other, other_count = spec_verify.verify(rule, moved)
        assert torch.equal(tokens[order], other)
        assert torch.equal(count[order], other_count)


def test_cactus_without_budget_decides_as_the_ratio_test() -> None:
    batch = step(LENGTHS, 37, sampled=True, temperature=MIXED, near=0.8, device=DEVICE)
    want = spec_verify.verify(Rule("ratio"), batch)
    for exact in (False, True):
        got = spec_verify.verify(Rule("cactus", delta=0.0, exact=exact), batch)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


def test_numbers_are_uniform_and_keyed() -> None:
    seeds = torch.tensor([1, 1, 2, -5], device=DEVICE)
    positions = torch.tensor([10, 11, 10, 10], device=DEVICE)
    u, noise = spec_random.draws(seeds, positions, 64, 4_000)
    again = spec_random.draws(seeds, positions, 64, 4_000)
    assert torch.equal(u, again[0])
    assert torch.equal(noise, again[1])
    assert len({tuple(row.tolist()) for row in u}) == 4
    assert (u >= 0).all()
    assert (u < 1).all()
    cells = ((1 - torch.exp(-noise.double())) * 50).long().clamp(max=49).flatten().cpu()
    assert chi_square(cells, torch.full((50,), 1 / 50)) > 1e-4
    pairs = noise[:, :-1].flatten().cpu().double(), noise[:, 1:].flatten().cpu().double()
    assert abs(torch.corrcoef(torch.stack(pairs))[0, 1]) < 0.02
    many = torch.arange(120, device=DEVICE)
    first, _ = spec_random.draws(torch.full_like(many, 7), many, 2, 1)
    for i in range(2):
        assert chi_square((first[:, i] * 4).long().cpu(), torch.full((4,), 1 / 4)) > 1e-4
    assert abs(torch.corrcoef(first.T.cpu())[0, 1]) < 0.35


def test_the_host_path_follows_the_law() -> None:
    """`spec_reference.verify` with its own numbers: first token of single drafts, all requests alike."""
    requests = 8000
    batch = step([1] * requests, 6, sampled=True)
    logits, draft_logits = batch.logits[:1].expand(2 * requests, 6), batch.draft_logits[:1].expand(2 * requests, 6)
    generator = torch.Generator().manual_seed(0)
    law = draft_logits[0].softmax(0)
    drafts = batch.drafts.clone()
    drafts[::2] = torch.multinomial(law, requests, replacement=True, generator=generator)
    same = altered(batch, logits=logits.contiguous(), draft_logits=draft_logits.contiguous(), drafts=drafts)
    tokens, count = ref.verify(Rule("hsd"), same)
    assert chi_square(tokens[:, 0], logits[0].softmax(0)) > 1e-4
    assert 1.2 < float(count.float().mean()) < 2
