"""Plain-PyTorch specification of `residual_decode`: a rank-one prior for the keys that were not read (RESA, section 4).

Shapes as in `reference`. The prior of a request holds, over its first `covered` pages, what one query would see: the
mean query mu of the prompt, for each query head. A decode query q reads its list exactly and takes the other covered
keys from the prior, shifted by `b = (q - mu) . mean_key * scale`, so that both queries agree on the average key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_ext.kernels import reference
from vllm_ext.kernels.reference import grouped

LEAST_REST = 1e-3
"""Share of the prior outside the list below which it is left out: a difference of two nearly equal sums."""


@dataclass
class Prior:
    """State of one request and layer: mu [Hq, D] in the model's dtype; fp32 out [Hq, D], lse [Hq] of attention with mu
    over `covered` pages, mean_key [H, D] of them."""

    mu: Tensor
    out: Tensor
    lse: Tensor
    mean_key: Tensor
    covered: int


def make_prior(mu: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, n: int, scale: float) -> Prior:
    """The prior over the complete pages of a request of `n` keys; mu [Hq, D], pages [N] physical."""
    covered = n // k_cache.shape[2]
    hq, d = mu.shape
    at = mu.device
    empty = Prior(
        mu, torch.zeros(hq, d, device=at), torch.full((hq,), -math.inf, device=at),
        torch.zeros(k_cache.shape[1], d, device=at), 0,
    )  # fmt: skip
    return fold(empty, k_cache, v_cache, pages, covered, scale)


def fold(prior: Prior, k_cache: Tensor, v_cache: Tensor, pages: Tensor, upto: int, scale: float) -> Prior:
    """The prior extended to the first `upto` pages; unchanged if it covers them."""
    count = upto - prior.covered
    if count <= 0:
        return prior
    page = k_cache.shape[2]
    new = pages[prior.covered : upto]
    out, lse = reference.sparse_attention(prior.mu[None].float(), k_cache, v_cache, new, None, count * page, scale)
    keys = k_cache[new].float().mean((0, 2))
    out, lse = reference.merge(torch.stack([prior.out, out[0]]), torch.stack([prior.lse, lse[0]]))
    mean = prior.mean_key + (keys - prior.mean_key) * (count / upto)
    return Prior(prior.mu, out, lse, mean, upto)


def explained(logits: Tensor, estimate: Tensor) -> Tensor:
    """Share of the variance of `logits` [..., n] that `estimate` explains up to a constant, at most 1; 1 if it is 0."""
    if not logits.shape[-1]:
        return torch.ones(logits.shape[:-1], device=logits.device)
    noise, total = ((x - x.mean(-1, keepdim=True)).square().mean(-1) for x in (logits - estimate, logits))
    return torch.where(total > 1e-12, 1 - noise / total.clamp(min=1e-12), 1.0)


def residual_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, ids: Tensor, n: int, scale: float, prior: Prior,
    weight: float, gate: float,
) -> Tensor:  # fmt: skip
    """Attention of one request over its list, the other covered keys from the prior: [m, Hq, D].

    Args:
        q: [m, Hq, D]; ids: [H, c] the list; weight: lambda, 0 = the list alone.
        gate: a row drops the prior where it explains less than this share of the variance of the logits that were
            read, and otherwise trusts it by that share; -inf = always and wholly.
    """
    out, lse = reference.sparse_attention(q, k_cache, v_cache, pages, ids, n, scale)
    if not prior.covered or not weight:
        return out
    heads, (m, hq, d) = k_cache.shape[1], q.shape
    g = hq // heads
    rows, mu = grouped(q, heads), grouped(prior.mu.expand(m, hq, d), heads)
    shared, level = (
        grouped(prior.out.expand(m, hq, d), heads),
        grouped(prior.lse.expand(m, hq)[..., None], heads)[..., 0],
    )
    mean = torch.empty_like(rows)
    for h in range(heads):
        listed = ids[h][(ids[h] >= 0) & (ids[h] < prior.covered)].long()
        keys, values = (c[pages[listed], h].float().flatten(0, 1) for c in (k_cache, v_cache))
        estimate = mu[h] @ keys.T * scale
        p = (estimate - level[h][:, None]).exp()
        rest = 1 - p.sum(1)
        share = explained(rows[h] @ keys.T * scale, estimate)
        use = (rest > LEAST_REST) & (share >= gate)
        trust = torch.ones_like(share) if gate == -math.inf else share.clamp(0, 1)
        shift = ((rows[h] - mu[h]) @ prior.mean_key[h]) * scale
        lse_rest = level[h] + rest.clamp(min=LEAST_REST).log() + shift + math.log(weight)
        lse_rest = lse_rest.masked_fill(~use, -math.inf)
        out_rest = (shared[h] - p @ values) / rest.clamp(min=LEAST_REST)[:, None]
        part = (trust * torch.sigmoid(lse_rest - grouped(lse[..., None], heads)[h, :, 0]))[:, None]
        mean[h] = grouped(out, heads)[h] + part * (out_rest - grouped(out, heads)[h])
    return mean.view(heads, m, g, d).transpose(0, 1).reshape(m, hq, d).to(q.dtype)
