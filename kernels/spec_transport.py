"""Optimal verification of n i.i.d. drafts at one position (Global Resolution: Thomas and Pal, ICLR 2026).

n drafts are drawn with replacement from q; the emitted token follows p exactly and is one of the drafts as often as any
rule allows. In the transport plan each multiset of drafts chooses one of its tokens with odds `exp(alpha)`, or rejects;
alpha minimises a convex dual. Whatever the solver leaves open costs acceptance, never the law: a token that would get
more than p is thinned to p, and what was not accepted is drawn from p less what was.

Batched over B positions, fixed work, no read-back. It pays where the target has scored what follows each of the n
drafts. A chain has scored one, so until vLLM verifies trees this is a library; for n = 1 the rule is the ratio test.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """A rule for one position.

    Attributes:
        tokens: [B, k] int64, the tokens that drafts can be, by p/q ascending.
        choice: [B, M, k] probability that a multiset of drafts emits a token of its own; the rest is rejection.
        residual: [B, V] unnormalised law of the token emitted after a rejection.
        accepted: [B] probability that a draft is emitted.
        optimum: [B] the largest such probability of any rule that keeps the law.
    """

    tokens: Tensor
    choice: Tensor
    residual: Tensor
    accepted: Tensor
    optimum: Tensor


def truncated(q: Tensor, k: int) -> Tensor:
    """q [B, V] restricted to its k most likely tokens and renormalised: the law to draw drafts from."""
    top = q.topk(min(k, q.shape[1]), 1)
    out = torch.zeros_like(q).scatter_(1, top.indices, top.values)
    return out / out.sum(1, keepdim=True)


@functools.cache
def multisets(k: int, n: int) -> tuple[tuple[tuple[int, ...], ...], tuple[float, ...]]:
    """How often each of k tokens is drawn, for every multiset of n draws, and the number of orders of each."""
    rows, orders = [], []
    for drawn in itertools.combinations_with_replacement(range(k), n):
        counts = [drawn.count(i) for i in range(k)]
        rows.append(tuple(counts))
        orders.append(math.factorial(n) / math.prod(map(math.factorial, counts)))
    return tuple(rows), tuple(orders)


def optimal_mass(p: Tensor, q: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest acceptance and one way to share it out.

    The obstruction is a set H whose all-inside draws carry more mass than it may absorb: `psi(H) = p(H) - q(H)^n`, the
    optimum is `1 + min psi`, and the minimiser is a prefix in the order of p/q.

    Args:
        p, q: [B, k] laws of the draft tokens, by p/q ascending; p may sum to less than 1.

    Returns:
        mass accepted of each token [B, k] (at most p), membership in the minimiser [B, k] bool, optimum [B].
    """
    zero = torch.zeros_like(p[:, :1])
    psi = torch.cat([zero, p.cumsum(1) - q.cumsum(1) ** n], 1)
    low, at = psi.min(1)
    least = psi.flip(1).cummin(1).values.flip(1)  # over all longer prefixes
    inside = torch.arange(p.shape[1], device=p.device) < at[:, None]
    return p - least.diff(dim=1), inside, 1 + low


def solve(p: Tensor, q: Tensor, n: int, k: int = 10, iterations: int = 10) -> Plan:
    """The plan of n drafts from `truncated(q, k)`.

    Args:
        p: [B, V] target law. q: [B, V] draft law; drafts must be drawn from `truncated(q, k)`.
        iterations: Newton steps; each costs O(C(k+n-1, n) k^2) per position.
    """
    q = truncated(q, k)
    order = _by_ratio(p, q, min(k, q.shape[1]))
    ps, qs = p.gather(1, order), q.gather(1, order)
    rows, orders = multisets(order.shape[1], n)
    counts = torch.tensor(rows, dtype=p.dtype, device=p.device)  # [M, k]
    weight = (
        torch.tensor(orders, dtype=p.dtype, device=p.device)
        * (counts * qs.clamp(min=torch.finfo(p.dtype).tiny).log()[:, None]).sum(2).exp()
    )  # [B, M]
    mass, inside, optimum = optimal_mass(ps, qs, n)
    present = counts > 0
    outer = (present & ~inside[:, None]).any(2)  # [B, M]: holds a token outside of the minimiser, always accepted
    usable = (present & (~inside[:, None] | ~outer[..., None])).to(p.dtype)
    slack = (~outer).to(p.dtype)
    alpha = torch.zeros_like(ps)
    for _ in range(iterations):
        alpha = _newton(weight, usable, slack, mass, alpha)
    choice = _choose(usable, slack, alpha)
    sent = (weight[..., None] * choice).sum(1)
    thin = torch.where(sent > ps, ps / sent.clamp(min=torch.finfo(p.dtype).tiny), 1)
    choice, sent = choice * thin[:, None], sent * thin
    residual = p.scatter_add(1, order, -sent).clamp(min=0)
    residual = torch.where(residual.sum(1, keepdim=True) > 0, residual, p)  # all is accepted, up to rounding
    return Plan(order, choice, residual, sent.sum(1), optimum)


def _by_ratio(p: Tensor, q: Tensor, k: int) -> Tensor:
    """The k tokens of largest q by p/q ascending: [B, k]."""
    top = q.topk(k, 1).indices
    qs = q.gather(1, top)
    ratio = torch.where(qs > 0, p.gather(1, top) / qs.clamp(min=torch.finfo(p.dtype).tiny), torch.inf)
    return top.gather(1, ratio.argsort(1))


def _choose(usable: Tensor, slack: Tensor, alpha: Tensor) -> Tensor:
    """Choice of every multiset among its usable tokens; rejection has odds `slack`: [B, M, k]."""
    share = usable * alpha.exp()[:, None]
    return share / (share.sum(2, keepdim=True) + slack[..., None]).clamp(min=torch.finfo(alpha.dtype).tiny)


def _newton(weight: Tensor, usable: Tensor, slack: Tensor, mass: Tensor, alpha: Tensor) -> Tensor:
    """One step on the convex dual, whose gradient is what each token gets less its `mass`; at most e^3 in odds."""
    choice = _choose(usable, slack, alpha)
    sent = (weight[..., None] * choice).sum(1)
    tiny, eps = torch.finfo(alpha.dtype).tiny, torch.finfo(alpha.dtype).eps
    ridge = sent * (1 + 4 * eps**0.5) + tiny**0.5  # odds of tokens that never meet a rejection are only relative
    hessian = torch.diag_embed(ridge) - torch.einsum("bm,bmi,bmj->bij", weight, choice, choice)
    move = torch.linalg.solve_ex(hessian, mass - sent).result
    return (alpha + move.nan_to_num().clamp(-3, 3)).clamp(-40, 40)


def index_of(drafts: Tensor, tokens: Tensor) -> Tensor:
    """Row of `multisets(k, n)` of drafts [B, n] (token ids): [B]."""
    k, n = tokens.shape[1], drafts.shape[1]
    place = (drafts[:, :, None] == tokens[:, None]).to(torch.int64).argmax(2).sort(1).values
    counts = torch.nn.functional.one_hot(place, k).sum(1)
    table = torch.tensor(multisets(k, n)[0], device=drafts.device)
    return (counts[:, None] == table).all(2).to(torch.int64).argmax(1)


def verify(plan: Plan, drafts: Tensor, u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The emitted token of each position and whether it is a draft.

    Args:
        drafts: [B, n] i.i.d. from the truncated draft law.
        u: [B] uniforms, and noise: [B, V] Exp(1), both independent of the drafts.
    """
    row = torch.arange(len(drafts), device=drafts.device)
    choice = plan.choice[row, index_of(drafts, plan.tokens)].cumsum(1)
    accepted = u < choice[:, -1]
    slot = torch.searchsorted(choice, u[:, None], right=True)[:, 0].clamp(max=choice.shape[1] - 1)
    other = (plan.residual.log() - noise.log()).argmax(1)
    return torch.where(accepted, plan.tokens[row, slot], other), accepted
