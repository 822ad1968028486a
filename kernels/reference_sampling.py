"""Plain-PyTorch specification of `tail_sample`: uniform sampling of the keys that no list holds (vAttention, sections
4, 5).

Shapes as in `reference`. The tail of a request and KV head is every key outside its list of pages: n_s keys, all of
complete pages, since the list holds the last ones. Draw i reads tail key `permutation(i)`: draws do not repeat, a
larger sample extends a smaller one, and b = n_s draws read the whole tail. The draws depend on seed, position, layer
and KV head alone, never on the batch, and serve all query rows of the KV head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from vllm_ext.kernels.reference import grouped

GUARANTEES = ("denominator", "output")
_MASK = 0xFFFFFFFF
ROUNDS = 3
"""Double rounds of the Feistel network."""


@dataclass(frozen=True)
class Target:
    """What the sample has to reach.

    Attributes:
        epsilon, delta: relative error `epsilon` in at least a share 1 - `delta` of the cases.
        guarantee: of the softmax denominator, or of the output vector (numerator and denominator each to epsilon / 4
            with delta / 2: their quotient then keeps 2 (e1 + e2) and d1 + d2).
        pilot, pilot_rate: draws of the pilot are max(pilot, pilot_rate * n_s).
        cap: largest share of the tail that is drawn; below 1 it can break the guarantee.
    """

    epsilon: float = 0.05
    delta: float = 0.05
    guarantee: str = "denominator"
    pilot: int = 80
    pilot_rate: float = 0.01
    cap: float = 1.0

    @property
    def factor(self) -> float:
        """z / epsilon with z the two-sided normal quantile."""
        share = 1 if self.guarantee == "denominator" else 2
        return NormalDist().inv_cdf(1 - self.delta / share / 2) * share**2 / self.epsilon

    def pilot_draws(self, tail: int) -> int:
        """Draws of the pilot from a tail of `tail` keys."""
        return min(tail, max(self.pilot, math.ceil(torch.tensor(self.pilot_rate).mul(tail).item())))


def mix(x: Tensor) -> Tensor:
    """A 32-bit hash with full avalanche (murmur3's finaliser); int64 tensors that hold 32-bit values."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def stream(seed: int, position: int, layer: int, head: int) -> int:
    """Key of one sample; `position` is that of the first query token of the step."""
    x = torch.tensor(seed & _MASK)
    for part in (position, layer, head):
        x = mix((x * 31 + part + 1) & _MASK)
    return int(x)


def permutation(i: Tensor, size: int, key: int) -> Tensor:
    """Images of `i` [...] under a pseudo-random permutation of 0 .. size - 1: a Feistel network, cycle-walked."""
    bits = max(2, (size - 1).bit_length())
    low, high = bits - bits // 2, bits // 2
    x = i.long()
    outside = torch.ones_like(x, dtype=torch.bool)
    while outside.any():
        left, right = x >> low, x & ((1 << low) - 1)
        for r in range(ROUNDS):
            left = left ^ (mix((right + key + 2 * r * 0x9E3779B9) & _MASK) & ((1 << high) - 1))
            right = right ^ (mix((left + key + (2 * r + 1) * 0x9E3779B9) & _MASK) & ((1 << low) - 1))
        x = torch.where(outside, (left << low) | right, x)
        outside = x >= size
    return x


def tail_keys(draws: Tensor, ids: Tensor, page: int) -> Tensor:
    """Positions of tail keys: draws [B] in 0 .. n_s - 1, ids [c] ascending list of one KV head -> [B]."""
    rank, offset = draws // page, draws % page
    before = torch.searchsorted(ids.long() - torch.arange(ids.numel(), device=ids.device), rank, right=True)
    return (rank + before) * page + offset


def sample_size(logits: Tensor, values: Tensor, out: Tensor, lse: Tensor, tail: int, target: Target) -> int:
    """Draws that the pilot asks for, by the central limit theorem, at most `tail`; largest over the rows.

    Args:
        logits: [rows, b0] of the pilot's keys; values: [b0, D]; out [rows, D], lse [rows]: the list's partial result.

    With w = exp(logit), D the estimated denominator and N the estimated numerator, the smallest b with
    `z * n_s * sigma(w) / sqrt(b) <= epsilon * D` (and the same for w * v and |N|, sigma^2 the trace of its covariance),
    corrected for a finite tail: b / (1 + b / n_s).
    """
    b0 = logits.shape[1]
    if b0 >= tail:
        return tail
    w = (logits.double() - lse.double()[:, None]).exp()  # relative to the list's denominator
    total = 1 + tail * w.mean(1)
    need = (target.factor * tail * w.std(1) / total) ** 2
    if target.guarantee == "output":
        wv = w[:, :, None] * values.double()
        numerator = out.double() + tail * wv.mean(1)
        trace = wv.var(1).sum(-1)
        need = torch.maximum(need, (target.factor * tail) ** 2 * trace / numerator.square().sum(-1).clamp(min=1e-30))
    b = math.ceil((need / (1 + need / tail)).max().item())
    return min(max(b, b0), tail)


def capped(b: int, tail: int, target: Target) -> int:
    """Draws after the limit `cap`, never below the pilot."""
    return min(b, max(target.pilot_draws(tail), int(torch.tensor(target.cap).mul(tail).item())))


def sample_tail(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, ids: Tensor, n: int, scale: float, out: Tensor,
    lse: Tensor, keys: list[int], target: Target, sizes: list[int] | None = None,
) -> tuple[Tensor, list[int], int]:  # fmt: skip
    """Add the sampled tail to the attention over a list, for one request.

    Args:
        q: [m, Hq, D]; pages: [N] physical pages; ids: [H, c] the list; out [m, Hq, D], lse [m, Hq]: its result.
        keys: `stream` of each KV head; sizes: draws of each KV head, instead of the pilot's answer (tests).

    Returns:
        output [m, Hq, D], draws of each KV head, and how many of them `cap` cut short. Every sampled logit gets
        log(n_s / b), so numerator and denominator are unbiased (Horvitz-Thompson).
    """
    heads, page = k_cache.shape[1], k_cache.shape[2]
    m, hq, d = q.shape
    g = hq // heads
    tail = (pages.numel() - ids.shape[1]) * page
    if not tail:
        return out, [0] * heads, 0
    rows = grouped(q, heads)  # [H, m * g, D]
    listed, level = grouped(out, heads), grouped(lse[..., None], heads)[..., 0]
    result, drawn, cut = torch.empty_like(listed), [], 0
    for h in range(heads):
        order = permutation(torch.arange(tail, device=q.device), tail, keys[h])

        def gather(draws: Tensor, h: int = h) -> tuple[Tensor, Tensor]:
            at = tail_keys(draws, ids[h], page)
            k, v = (c[pages[at // page], h, at % page].float() for c in (k_cache, v_cache))
            return rows[h] @ k.T * scale, v

        logits, v = gather(order[: target.pilot_draws(tail)])
        b = sample_size(logits, v, listed[h], level[h], tail, target)
        final = capped(b, tail, target) if sizes is None else sizes[h]
        cut += final < b
        logits, v = gather(order[:final])
        logits = torch.cat([level[h][:, None], logits + math.log(tail / final)], 1)
        weight = logits.softmax(1)
        result[h] = weight[:, :1] * listed[h] + weight[:, 1:] @ v
        drawn.append(final)
    return result.view(heads, m, g, d).transpose(0, 1).reshape(m, hq, d).to(q.dtype), drawn, cut
