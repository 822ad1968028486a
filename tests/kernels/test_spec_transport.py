"""Optimal transport of n drafts: the optimum, the law at any solver accuracy, and the rule at run time."""

from __future__ import annotations

import itertools

import pytest
import torch
from spec_batches import chi_square, tv
from torch import Tensor

from vllm_ext.kernels import spec_transport as transport


def pairs(vocab: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random target and draft laws [count, vocab] in float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = 1.5 * torch.randn(2, count, vocab, generator=generator, dtype=torch.float64)
    return draw[0].softmax(1), (0.5 * draw[0] + draw[1]).softmax(1)


def output_law(plan: transport.Plan, p: Tensor, q: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Law of the emitted token [B, V] and acceptance [B], over every tuple of drafts; they are drawn from q."""
    vocab = p.shape[1]
    out, accepted = torch.zeros_like(p), torch.zeros_like(p[:, 0])
    row = torch.arange(len(p))
    left = plan.residual / plan.residual.sum(1, keepdim=True).clamp(min=1e-30)
    for drafts in itertools.product(range(vocab), repeat=n):
        x = torch.tensor(drafts).expand(len(p), n)
        mass = q.gather(1, x).prod(1)
        choice = plan.choice[row, transport.index_of(x, plan.tokens)] * mass[:, None]
        out.scatter_add_(1, plan.tokens, choice)
        accepted += choice.sum(1)
        out += left * (mass - choice.sum(1))[:, None]
    return out, accepted


def brute_optimum(p: Tensor, q: Tensor, n: int) -> float:
    """`1 + min_H p(H) - q(H)^n` over every set of tokens: the minimum cut of the transport network."""
    sets = itertools.product([0.0, 1.0], repeat=len(p))
    return 1 + min(float((p * h).sum() - (q * h).sum() ** n) for h in (torch.tensor(s).double() for s in sets))


def recursive_rejection(p: Tensor, q: Tensor, n: int) -> float:
    """Acceptance of the usual rule for n i.i.d. drafts: ratio tests against the residual of the one before."""
    left, out, target = 1.0, 0.0, p
    for _ in range(n):
        accept = float(torch.minimum(target, q).sum())
        out += left * accept
        left *= 1 - accept
        target = (target - q).clamp(min=0)
        target = target / target.sum().clamp(min=1e-300)
    return out


@pytest.mark.parametrize(("vocab", "n"), [(3, 2), (5, 2), (4, 3), (5, 3)])
@pytest.mark.parametrize("iterations", [0, 1, 3, 30])
def test_law_is_exact_at_any_accuracy(vocab: int, n: int, iterations: int) -> None:
    p, q = pairs(vocab, 15, seed=vocab * n)
    plan = transport.solve(p, q, n, k=vocab, iterations=iterations)
    law, accepted = output_law(plan, p, q, n)
    assert float((law - p).abs().max()) < 1e-12
    assert torch.allclose(accepted, plan.accepted, atol=1e-12)
    assert (plan.accepted <= plan.optimum + 1e-12).all()


def test_a_residual_that_trusts_the_solver_fails() -> None:
    """Control: p less the mass that a solved plan would accept, after a step that has not solved it."""
    p, q = pairs(4, 15)
    plan = transport.solve(p, q, 2, k=4, iterations=1)
    ps, qs = p.gather(1, plan.tokens), q.gather(1, plan.tokens)
    trusting = p.scatter_add(1, plan.tokens, -transport.optimal_mass(ps, qs, 2)[0]).clamp(min=0)
    law, _ = output_law(plan._replace(residual=trusting), p, q, 2)
    assert float((law - p).abs().sum(1).mean()) > 0.005


@pytest.mark.parametrize(("vocab", "n"), [(3, 2), (5, 2), (4, 3), (5, 3), (6, 5)])
def test_optimum_is_the_minimum_cut_and_is_reached(vocab: int, n: int) -> None:
    p, q = pairs(vocab, 25, seed=vocab + n)
    plan = transport.solve(p, q, n, k=vocab, iterations=40)
    for i in range(len(p)):
        assert float(plan.optimum[i]) == pytest.approx(brute_optimum(p[i], q[i], n), abs=1e-12)
        assert float(plan.accepted[i]) == pytest.approx(float(plan.optimum[i]), abs=1e-6)
        assert float(plan.accepted[i]) >= recursive_rejection(p[i], q[i], n) - 1e-6


def test_few_steps_lose_little() -> None:
    p, q = pairs(60, 200)
    lost = [float((s.optimum - s.accepted).mean()) for s in (transport.solve(p, q, 2, 8, i) for i in (1, 3, 5, 10))]
    assert lost == sorted(lost, reverse=True)
    assert lost[2] < 1e-4
    assert lost[3] < 1e-6


def test_single_draft_is_the_ratio_test() -> None:
    p, q = pairs(5, 30)
    plan = transport.solve(p, q, 1, k=5, iterations=40)
    assert torch.allclose(plan.optimum, torch.minimum(p, q).sum(1), atol=1e-12)
    assert torch.allclose(plan.accepted, plan.optimum, atol=1e-8)


def test_drafts_from_the_likeliest_tokens_keep_the_law() -> None:
    """Drafts come from the k likeliest of more tokens; the others are reached through the residual."""
    p, q = pairs(6, 20, seed=4)
    drawn = transport.truncated(q, 3)
    law, _ = output_law(transport.solve(p, q, 2, k=3), p, drawn, 2)
    assert float((law - p).abs().max()) < 1e-12
    wrong, _ = output_law(transport.solve(p, q, 2, k=3), p, transport.truncated(q, 4), 2)
    assert float((wrong - p).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["equal", "disjoint", "one-hot target", "one-hot draft", "excluded token"])
def test_corner_cases(kind: str) -> None:
    p, q = pairs(4, 6, seed=1)
    hot = torch.eye(4, dtype=torch.float64)
    if kind == "equal":
        q = p.clone()
    elif kind == "disjoint":
        p, q = hot[:1].expand(6, 4), hot[1:2].expand(6, 4)
    elif kind == "one-hot target":
        p = hot[2:3].expand(6, 4)
    elif kind == "one-hot draft":
        q = hot[2:3].expand(6, 4)
    else:
        p = torch.where(hot[0] > 0, 0.0, p)
        p = p / p.sum(1, keepdim=True)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        plan = transport.solve(p.to(dtype), q.to(dtype), 2, k=4)
        law, _ = output_law(plan, p.to(dtype), q.to(dtype), 2)
        assert float((law - p).abs().max()) < tolerance
        assert torch.isfinite(plan.choice).all()
    if kind == "equal":
        assert torch.allclose(plan.accepted, torch.ones(6), atol=1e-4)


def test_sampled_tokens_follow_the_law() -> None:
    p, q = pairs(12, 1, seed=8)
    count, n, k = 60_000, 2, 6
    generator = torch.Generator().manual_seed(0)
    drawn = transport.truncated(q, k)
    drafts = torch.multinomial(drawn.expand(count, -1), n, replacement=True, generator=generator)
    one = transport.solve(p, q, n, k)
    plan = transport.Plan(*(t.expand(count, *t.shape[1:]) for t in one))
    noise = torch.empty(count, 12, dtype=torch.float64).exponential_(generator=generator)
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    token, accepted = transport.verify(plan, drafts, u, noise)
    assert chi_square(token, p[0]) > 1e-4
    assert float(accepted.double().mean()) == pytest.approx(float(one.accepted[0]), abs=0.01)
    assert (drafts[accepted] == token[accepted, None]).any(1).all()
    assert tv(torch.bincount(token, minlength=12) / count, p[0]) < 0.02
