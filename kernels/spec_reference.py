"""Verification rules of speculative decoding in plain torch: the specification of `spec_verify`, and the CPU product.

B requests, K draft positions, V tokens. `p` [B, K+1, V] is the target's law at every position, `q` [B, K, V] the law
that the draft tokens `x` [B, K] were drawn from, or None for deterministic drafts (q one-hot at x). Request b has
`n[b]` drafts; later cells of x are ignored. Float64 in, float64 out.

A rule accepts the first `tau` drafts of a request and emits one more token, from the residual law
`[scale * p - q]+` (normalised) at position tau, or from p if tau = n. Forward rules stop at the first position whose
uniform is not below `accept`; the backward rule takes the last position whose uniform is.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from vllm_ext.kernels.spec_rules import Rule

if TYPE_CHECKING:
    from vllm_ext.spec_decode.protocols import VerifyBatch


class Verdict(NamedTuple):
    """What a rule decides before any random number is drawn.

    Attributes:
        accept: [B, K] probabilities; of keeping position t (forward), or of ending right after it (backward).
        scale: [B, K+1] factor of p in the residual law.
        exclude: the drafted token has no residual mass.
        backward: which way `accept` is scanned.
    """

    accept: Tensor
    scale: Tensor
    exclude: bool
    backward: bool = False


def at_tokens(law: Tensor, x: Tensor) -> Tensor:
    """`law[b, t, x[b, t]]`: [B, K]; 0 where x is negative."""
    found = law[:, : x.shape[1]].gather(2, x.clamp(min=0).long()[..., None])[..., 0]
    return torch.where(x >= 0, found, torch.zeros_like(found))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """min(1, a / b) without overflow, 0 where a = 0."""
    return torch.where(a >= b, (a > 0).to(a.dtype), a / b.clamp(min=torch.finfo(b.dtype).tiny))


def ratio(p: Tensor, q: Tensor | None, x: Tensor, n: Tensor) -> Verdict:
    """Token-wise ratio test: accept with min(1, p/q), emit from [p - q]+ (Leviathan et al., ICML 2023). Lossless."""
    px = at_tokens(p, x)
    qx = torch.ones_like(px) if q is None else at_tokens(q, x)
    return Verdict(_ratio(px, qx), torch.ones_like(p[..., 0]), exclude=True)


def prefix_ratio(px: Tensor, qx: Tensor) -> Tensor:
    """Capped joint ratio of every prefix, `R_0 = 1`, `R_t = min(R_{t-1} p(x_t)/q(x_t), 1)`: [B, K+1]."""
    out = [torch.ones_like(px[:, 0])]
    for t in range(px.shape[1]):
        out.append(_ratio(out[-1] * px[:, t], qx[:, t]))
    return torch.stack(out, 1)


def hsd(p: Tensor, q: Tensor | None, x: Tensor, n: Tensor) -> Verdict:
    """Hierarchical speculative decoding with capped prefix ratios (Zhou et al., ICLR 2026): lossless on blocks.

    With `A_t = sum_v [R_t p_t(v) - q_t(v)]+` the last position kept is t with probability `A_t / (A_t + 1 - R_t)`,
    R_n for the whole draft. For one chain of drafts this is block verification (Sun et al., 2024).
    """
    k = x.shape[1]
    px = at_tokens(p, x)
    r = prefix_ratio(px, torch.ones_like(px) if q is None else at_tokens(q, x))
    if q is None:
        mass = r[:, :-1] * (1 - px)
    else:
        mass = (r[:, :-1, None] * p[:, :k] - q).clamp(min=0).sum(2)
    rest = mass + 1 - r[:, :-1]
    h = torch.where(rest > 0, mass / rest.clamp(min=torch.finfo(p.dtype).tiny), torch.ones_like(rest))
    h = torch.cat([h[:, 1:], r[:, -1:]], 1)  # h_t of t = 1 .. K
    last = torch.arange(1, k + 1, device=x.device) == n[:, None]
    return Verdict(torch.where(last, r[:, 1:], h), r, exclude=q is None, backward=True)


def binary_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL divergence in nats of Bernoulli(a) from Bernoulli(b), elementwise."""
    tiny = torch.finfo(a.dtype).tiny
    one = a * (a.clamp(min=tiny) / b.clamp(min=tiny)).log()
    return one + (1 - a) * ((1 - a).clamp(min=tiny) / (1 - b).clamp(min=tiny)).log()


def raised(px: Tensor, delta: float, exact: bool) -> Tensor:
    """Cactus' probability of the drafted token: its own `px`, raised as far as the divergence budget allows.

    Args:
        px: target probabilities of drafted tokens.
        delta: budget in nats.
        exact: solve `kl(gamma || px) = delta` by bisection from below; else the paper's second-order solution.
    """
    if not exact or delta == 0:
        return (px + (2 * delta * px * (1 - px)).sqrt()).clamp(max=1)
    low, high = px.clone(), torch.ones_like(px)
    for _ in range(60):
        middle = (low + high) / 2
        inside = binary_kl(middle, px) <= delta
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return torch.where(-px.log() <= delta, torch.ones_like(px), torch.where(px > 0, low, torch.zeros_like(px)))


def cactus(p: Tensor, q: Tensor | None, x: Tensor, n: Tensor, delta: float, exact: bool) -> Verdict:
    """Constrained acceptance (Hao and Mou, ICLR 2026): the ratio test against h instead of p. NOT lossless.

    h has the drafted token at `gamma` (see `raised`) and the others in p's proportions, so that
    `KL(h || p) = kl(gamma || p(x))`; bonus tokens are drawn from p.
    """
    px = at_tokens(p, x)
    gamma = raised(px, delta, exact)
    qx = torch.ones_like(px) if q is None else at_tokens(q, x)
    rest = torch.where(px < 1, (1 - gamma) / (1 - px).clamp(min=torch.finfo(p.dtype).tiny), torch.ones_like(px))
    scale = torch.cat([rest, torch.ones_like(px[:, :1])], 1)
    return Verdict(_ratio(gamma, qx), scale, exclude=True)


def entropy(p: Tensor, kind: Literal["normalized", "top3"]) -> Tensor:
    """Entropy over the last dimension: divided by log V, or in nats over the three largest, renormalised."""
    if kind == "top3":
        p = p.topk(min(3, p.shape[-1]), -1).values
        p = p / p.sum(-1, keepdim=True)
    h = torch.special.entr(p).sum(-1)
    return h if kind == "top3" else h / torch.log(torch.tensor(p.shape[-1], dtype=p.dtype))


def relaxed(match: Tensor, entropies: Tensor, n: Tensor, rule: Rule) -> Tensor:
    """FLy: which positions are kept, [B, K] bool (Li et al., ICLR 2026). NOT lossless.

    A mismatch is forgiven if the target is uncertain there (entropy >= theta) and agrees with all of the following
    `window` drafts of this step; `entropy="top3"` counts the mismatch as the window's first position, and a mismatch
    within the last `window` positions is never forgiven (both as in the published code).

    Args:
        match: [B, K] bool, drafted token = the target's own token.
        entropies: [B, K] of the target, see `entropy`.
        n: [B] drafts of each request.
    """
    k = match.shape[1]
    t = torch.arange(k, device=match.device)
    reach = rule.window - (rule.entropy == "top3" and rule.window > 0)
    inside = (t[None, :] > t[:, None]) & (t[None, :] <= t[:, None] + reach)  # [K, K]: position, its window
    agrees = (match[:, None, :] | ~inside).all(2)
    complete = t[None, :] + rule.window < n[:, None]
    return match | (agrees & complete & (entropies >= rule.theta))


def verdict(rule: Rule, p: Tensor, q: Tensor | None, x: Tensor, n: Tensor) -> Verdict:
    """The verdict of `rule`; for `fly` that of the match test, before any mismatch is forgiven."""
    if rule.kind == "hsd":
        return hsd(p, q, x, n)
    if rule.kind == "cactus":
        return cactus(p, q, x, n, rule.delta, rule.exact)
    return ratio(p, q, x, n)


def stop(rule: Rule, found: Verdict, n: Tensor, u: Tensor, entropies: Tensor | None = None) -> Tensor:
    """Accepted drafts tau [B] for uniforms u [B, K]; `entropies` [B, K] only for `fly`."""
    k = u.shape[1]
    t = torch.arange(k, device=u.device)
    inside = t < n[:, None]
    kept = (u < found.accept) & inside
    if found.backward:
        return torch.where(kept, t + 1, 0).amax(1)
    if rule.kind == "fly":
        assert entropies is not None
        kept = relaxed(kept, entropies, n, rule) & inside
    return kept.long().cumprod(1).sum(1)


def residual(found: Verdict, p: Tensor, q: Tensor | None, x: Tensor, n: Tensor, tau: Tensor) -> Tensor:
    """Unnormalised law of the token emitted after tau [B] accepted drafts: [B, V]; p itself where tau = n."""
    row, at = torch.arange(len(tau), device=tau.device), tau.clamp(max=x.shape[1] - 1)
    law = p[row, tau]
    out = found.scale[row, tau][:, None] * law
    if q is not None:
        out = out - q[row, at]
    out = out.clamp(min=0)
    if found.exclude:
        token = x[row, at].long()[:, None]
        out = torch.where(token >= 0, out.scatter(1, token.clamp(min=0), 0.0), out)
    return torch.where((tau < n)[:, None], out, law)


class Dense(NamedTuple):
    """A step as dense laws: p [B, K+1, V], q [B, K, V] or None, x [B, K], n [B], entropies [B, K] or None."""

    p: Tensor
    q: Tensor | None
    x: Tensor
    n: Tensor
    entropies: Tensor | None


def dense(rule: Rule, batch: VerifyBatch, dtype: torch.dtype = torch.float32) -> Dense:
    """The laws of a ragged step. Greedy requests become one-hot laws, which every rule treats exactly.

    A draft of -1 ends its request's chain, and p follows; unless it was sampled, then it is one that p cannot produce.
    """
    k, rows = max(batch.max_drafts, 1), batch.logits.shape[0]
    start, own = batch.cu_rows[:-1].long(), (batch.cu_rows[1:] - batch.cu_rows[:-1] - 1).long()
    t = torch.arange(k + 1, device=start.device)
    at = (start[:, None] + t).clamp(max=rows - 1)
    inside = t[:k] < own[:, None]
    x = torch.where(inside, batch.drafts[at[:, :k]].long(), -1)
    greedy = batch.temperature == 0
    random = ~greedy & (batch.draft_temperature > 0) & (rule.kind != "fly")
    sampled = torch.zeros_like(inside) if batch.draft_row is None else batch.draft_row[at[:, :k]] >= 0
    sampled = sampled & random[:, None] & inside
    n = ((x >= 0) | sampled).long().cumprod(1).sum(1)
    p = batch.logits.to(dtype)[at].softmax(2)
    entropies = entropy(p[:, :k], rule.entropy) if rule.kind == "fly" else None
    hot = torch.zeros_like(p).scatter_(2, p.argmax(2, keepdim=True), 1.0)
    p = torch.where(greedy[:, None, None], hot, p)
    q = None
    if batch.draft_logits is not None and batch.draft_row is not None and rule.kind != "fly":
        warm = torch.where(batch.draft_temperature > 0, batch.draft_temperature, 1).to(dtype)[:, None, None]
        drawn = batch.draft_logits[batch.draft_row[at[:, :k]].clamp(min=0), : p.shape[2]].to(dtype)
        missing = p.shape[2] - drawn.shape[2]  # a padded target vocabulary is wider than the draft's
        q = (torch.nn.functional.pad(drawn, (0, missing), value=float("-inf")) / warm).softmax(2)
        one_hot = torch.zeros_like(q).scatter_(2, x.clamp(min=0)[..., None], 1.0)
        q = torch.where(sampled[..., None], q, one_hot)
    return Dense(p, q, x, n, entropies)


def emit(rule: Rule, laws: Dense, u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, K+1] int64 (-1 beyond) and their number [B] int32, for given random numbers.

    Args:
        u: [B, K] uniforms in [0, 1), independent of what drew the drafts.
        noise: [B, V] independent Exp(1); the emitted token is the one with the smallest noise / weight.
    """
    p, q, x, n, entropies = laws
    found = verdict(rule, p, q, x, n)
    tau = stop(rule, found, n, u, entropies)
    weight = residual(found, p, q, x, n, tau)
    law = p[torch.arange(len(tau), device=tau.device), tau]
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, law)  # p = q up to rounding
    token = (weight.log() - noise.log()).argmax(1)
    out = torch.where(torch.arange(x.shape[1], device=x.device) < tau[:, None], x.long(), -1)
    out = torch.cat([out, torch.full_like(out[:, :1], -1)], 1).scatter_(1, tau[:, None], token[:, None])
    return out, (tau + 1).to(torch.int32)


def verify(rule: Rule, batch: VerifyBatch) -> tuple[Tensor, Tensor]:
    """Tokens [B, K+1] int64 (-1 beyond) and their number [B] int32; random numbers from (seed, first position)."""
    laws = dense(rule, batch)
    requests, vocab = laws.p.shape[0], laws.p.shape[2]
    u, noise = torch.empty(laws.x.shape), torch.empty(requests, vocab)
    keys = zip(batch.seeds.tolist(), batch.positions[batch.cu_rows[:-1].long()].tolist())
    for b, (seed, position) in enumerate(keys):
        digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=4).digest()  # all that mt19937 takes
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        u[b].uniform_(generator=generator)
        noise[b].exponential_(generator=generator)
    tokens, count = emit(rule, laws, u.to(laws.p.device), noise.to(laws.p.device))
    return tokens[:, : batch.max_drafts + 1], count
