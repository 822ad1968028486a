"""Verification steps for tests: ragged batches of random laws, and exact output laws by enumeration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vllm_ext.kernels import spec_reference as ref
from vllm_ext.kernels.spec_rules import Rule
from vllm_ext.spec_decode.protocols import VerifyBatch

RULES = {
    "ratio": Rule("ratio"),
    "hsd": Rule("hsd"),
    "cactus": Rule("cactus", delta=0.5),
    "cactus exact": Rule("cactus", delta=0.5, exact=True),
    "fly": Rule("fly", theta=0.3, window=1),
    "fly top3": Rule("fly", theta=0.3, window=2, entropy="top3"),
}


def step(
    lengths: Sequence[int],
    vocab: int,
    *,
    seed: int = 0,
    sampled: bool = True,
    temperature: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    spread: float = 1.5,
    near: float = 0.5,
) -> VerifyBatch:
    """A step of requests with these numbers of drafts; `near` says how close the draft law is to the target's."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * spread

    r, k = len(lengths), max([1, *lengths])
    cu = torch.tensor([0, *lengths]).cumsum(0) + torch.arange(r + 1)
    owner = torch.repeat_interleave(torch.arange(r), torch.tensor(lengths) + 1)
    own_temperature = torch.tensor(temperature or [1.0] * r)
    raw = rand(len(owner), vocab)
    draft_logits = near * raw + (1 - near) * rand(len(owner), vocab)
    warm = own_temperature[owner][:, None].clamp(min=1e-6)
    hot = torch.nn.functional.one_hot(draft_logits.argmax(1), vocab).float()
    law = torch.where(own_temperature[owner][:, None] > 0, (draft_logits / warm).softmax(1), hot)
    drafts = torch.multinomial(law, 1, generator=generator)[:, 0]
    bonus = torch.zeros(len(owner), dtype=torch.bool)
    bonus[cu[1:] - 1] = True
    drafts[bonus] = -1
    logits = torch.where(own_temperature[owner][:, None] > 0, raw / warm, raw).to(dtype)
    draft_row = torch.where(bonus, -1, torch.arange(len(owner)))
    positions = torch.arange(len(owner)) + 7
    return VerifyBatch(
        logits.to(device), drafts.to(device), cu.int().to(device), owner.int().to(device), own_temperature.to(device),
        torch.randint(2**62, (r,), generator=generator).to(device), positions.to(device),
        draft_logits.to(dtype).to(device) if sampled else None, draft_row.to(device) if sampled else None,
        own_temperature.to(device), k,
    )  # fmt: skip


def stop_law(accept: Tensor, n: int, backward: bool) -> Tensor:
    """Probabilities of tau = 0 .. n for acceptance probabilities [B, n]: [B, n+1]."""
    one = torch.ones_like(accept[:, :1])
    if backward:
        out, left = [], one[:, 0]
        for t in reversed(range(n)):
            out.append(left * accept[:, t])
            left = left * (1 - accept[:, t])
        return torch.stack([left, *reversed(out)], 1)
    reach = torch.cat([one, accept[:, :n]], 1).cumprod(1)
    return reach * torch.cat([1 - accept[:, :n], one], 1)


class Tree:
    """Context-dependent conditional laws over all prefixes: `law[t]` [V^t, V] float64."""

    def __init__(self, vocab: int, depth: int, seed: int, spread: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab = vocab
        self.law = [
            (spread * torch.randn(vocab**t, vocab, generator=generator, dtype=torch.float64)).softmax(1)
            for t in range(depth)
        ]

    def joint(self, depth: int) -> Tensor:
        """Law of the first `depth` tokens: [V^depth]."""
        mass = torch.ones(1, dtype=torch.float64)
        for law in self.law[:depth]:
            mass = (mass[:, None] * law).flatten()
        return mass


Sampler = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(p [B, K+1, V], q [B, K, V], x [B, K], n [B]) -> (law of tau [B, K+1], law of the emitted token [B, K+1, V])."""


def by_rule(rule: Rule, one_hot: bool = False) -> Sampler:
    """The exact laws of a rule of `spec_reference` that draws forward or backward."""

    def laws(p: Tensor, q: Tensor, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        draft = None if one_hot else q
        found = ref.verdict(rule, p, draft, x, n)
        inside = torch.arange(x.shape[1]) < n[:, None]
        return stop_law(found.accept * inside, x.shape[1], found.backward), normalized(residuals(found, p, draft, x, n))

    return laws


def residuals(found: ref.Verdict, p: Tensor, q: Tensor | None, x: Tensor, n: Tensor) -> Tensor:
    """Unnormalised law of the emitted token for every tau: [B, K+1, V]."""
    each = (ref.residual(found, p, q, x, n, torch.full_like(n, t)) for t in range(p.shape[1]))
    return torch.stack(list(each), 1)


def normalized(weights: Tensor) -> Tensor:
    """Rows that sum to 1, or to 0 where there is nothing."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)


def all_drafts(vocab: int, k: int) -> Tensor:
    """Every sequence of k tokens, in the order of prefix numbers: [V^k, k]."""
    return torch.cartesian_prod(*[torch.arange(vocab)] * k).view(-1, k)


def path(tree: Tree, x: Tensor, depth: int) -> Tensor:
    """`tree`'s laws along the drafts x [B, K]: [B, depth, V]."""
    prefix = torch.zeros(len(x), dtype=torch.long)
    out = []
    for t in range(depth):
        out.append(tree.law[t][prefix])
        if t < x.shape[1]:
            prefix = prefix * tree.vocab + x[:, t]
    return torch.stack(out, 1)


def output_law(target: Tree, draft: Tree, k: int, laws: Sampler, drawn: Tree | None = None) -> tuple[Tensor, float]:
    """Exact law of the first k+1 tokens [V^(k+1)] when drafts come from `drawn` (default: `draft`), and E[tau].

    After a step that emits fewer tokens the rest is drawn from the target, so the law is right iff every step's is.
    """
    v, x = target.vocab, all_drafts(target.vocab, k)
    p, q = path(target, x, k + 1), path(draft, x, k)
    mass = (drawn or draft).joint(k)
    tau, emitted = laws(p, q, x, torch.full((len(x),), k))
    found = [torch.zeros(v ** (t + 1), dtype=torch.float64) for t in range(k + 1)]
    prefix = torch.zeros(len(x), dtype=torch.long)
    for t in range(k + 1):
        cells = (prefix[:, None] * v + torch.arange(v)).flatten()
        found[t].index_add_(0, cells, (mass[:, None] * tau[:, t : t + 1] * emitted[:, t]).flatten())
        if t < k:
            prefix = prefix * v + x[:, t]
    total = found[0]
    for t in range(1, k + 1):
        total = found[t] + (total[:, None] * target.law[t]).flatten()
    return total, float((mass[:, None] * tau * torch.arange(k + 1)).sum())


def chi_square(tokens: Tensor, law: Tensor) -> float:
    """p-value of observed cells [N] against their law [C]; cells expected less than five times are merged.

    By the cube-root approximation of Wilson and Hilferty.
    """
    count = torch.bincount(tokens, minlength=len(law)).double()
    expected = law.double() * len(tokens)
    if (count[expected == 0] > 0).any():
        return 0.0
    rare = expected < 5
    count = torch.cat([count[~rare], count[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    x = float(((count - expected)[keep] ** 2 / expected[keep]).sum())
    k = int(keep.sum()) - 1
    z = ((x / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    return 0.5 * math.erfc(z / math.sqrt(2))


def tv(a: Tensor, b: Tensor) -> float:
    """Total variation distance."""
    return float((a - b).abs().sum() / 2)
