"""ProtoKV: clusters of keys around prototypes that need no iteration, kept or evicted whole (ICLR 2026).

Tokens that differ from their neighbours (semantic-anchored) get prototypes by random hashing, the others
(position-determined) by even chunks; every token joins its nearest prototype. Shapes: H KV heads, n tokens, D head
size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SEED = 0
"""Of the random features: all layers, heads and ranks draw the same ones."""


def deviation(keys: Tensor, reach: int) -> Tensor:
    """How unlike its neighbours each key is: minus the standardised mean cosine to the keys within `reach` tokens.

    Args:
        keys: [H, n, D].

    Returns:
        [H, n] fp32.
    """
    unit = F.normalize(keys.float(), dim=-1)
    n = unit.shape[1]
    total = torch.cat([torch.zeros_like(unit[:, :1]), unit], 1).double().cumsum(1)
    at = torch.arange(n, device=keys.device)
    first, end = (at - reach).clamp(min=0), (at + reach + 1).clamp(max=n)
    near = (total[:, end] - total[:, first]).float()
    similar = ((near * unit).sum(-1) - 1) / (end - first - 1).clamp(min=1)
    return (similar.mean(-1, keepdim=True) - similar) / similar.std(-1, keepdim=True).clamp(min=1e-6)


def hash_buckets(keys: Tensor, bits: int) -> Tensor:
    """Bucket of each key: the signs of `bits` random Fourier features `cos(W k + b)`.

    Args:
        keys: [H, p, D] fp32; the features' width is their median distance.

    Returns:
        [H, p] int64 in [0, 2^bits).
    """
    draw = torch.Generator().manual_seed(SEED)
    w = torch.randn(bits, keys.shape[-1], generator=draw).to(keys.device)
    b = (torch.rand(bits, generator=draw) * 2 * torch.pi).to(keys.device)
    p = keys.shape[1]
    pairs = torch.triu_indices(p, p, 1, device=keys.device)
    distance = torch.cdist(keys, keys)[:, pairs[0], pairs[1]] if p > 1 else keys.new_ones(keys.shape[0], 1)
    sigma = distance.median(-1).values.clamp(min=1e-6)
    bit = torch.cos(keys @ w.T / sigma[:, None, None] + b) >= 0
    return (bit.long() << torch.arange(bits, device=keys.device)).sum(-1)


def prototypes(keys: Tensor, anchors: int, bits: int, chunks: int, reach: int) -> tuple[Tensor, Tensor]:
    """Unit prototypes [H, u + v, D] fp32 and which of them exist [H, u + v] bool, u = 2^bits hashed, v chunks.

    Args:
        keys: [H, n, D].
        anchors: most deviating tokens that are hashed; 0 = none, and u = 0.
        chunks: v.
        reach: of the neighbourhood.
    """
    heads, n, dim = keys.shape
    k = keys.float()
    anchors = min(anchors, n - 1)
    parts, found = [], []
    hashed = torch.zeros(heads, n, dtype=torch.bool, device=keys.device)
    if anchors > 0:
        index = deviation(k, reach).topk(anchors, -1).indices
        hashed.scatter_(1, index, True)
        chosen = k.gather(1, index[..., None].expand(-1, -1, dim))
        member = F.one_hot(hash_buckets(chosen, bits), 2**bits).to(k.dtype)
        parts.append(member.transpose(1, 2) @ chosen)
        found.append(member.any(1))
    rest = n - anchors
    chunks = min(chunks, rest)
    order = (~hashed).long().cumsum(1) - 1
    chunk = torch.where(hashed, chunks, order * chunks // rest)
    sums = k.new_zeros(heads, chunks + 1, dim)
    sums.scatter_add_(1, chunk[..., None].expand(-1, -1, dim), k)
    parts.append(sums[:, :chunks])
    found.append(torch.ones(heads, chunks, dtype=torch.bool, device=keys.device))
    return F.normalize(torch.cat(parts, 1), dim=-1), torch.cat(found, 1)


def assign(keys: Tensor, proto: Tensor, exists: Tensor) -> Tensor:
    """Number of the prototype with the largest cosine to each key: [H, n, D], [H, m, D], [H, m] -> [H, n] int64."""
    similar = F.normalize(keys.float(), dim=-1) @ proto.transpose(1, 2)
    return similar.masked_fill(~exists[:, None], -torch.inf).argmax(-1)


def cluster_scores(cluster: Tensor, worth: Tensor, count: int, mean: bool) -> Tensor:
    """Sum, or mean, of the members' worth: [H, n] int64 and fp32 -> [H, count]; empty clusters get -inf."""
    zero = worth.new_zeros(worth.shape[0], count)
    size = zero.scatter_add(1, cluster, torch.ones_like(worth))
    total = zero.scatter_add(1, cluster, worth)
    score = total / size.clamp(min=1) if mean else total
    return score.masked_fill(size == 0, -torch.inf)


def whole_clusters_first(cluster: Tensor, score: Tensor, tokens: Tensor) -> Tensor:
    """Token scores that keep clusters whole, best cluster first; only the last one to fit is cut, by `tokens`.

    Args:
        cluster: [H, n] int64; score: [H, m] of the clusters; tokens: [H, n] attention.

    Returns:
        [H, n] fp32 whole numbers, all different; ties go to the newer token and the lower cluster.
    """
    n = tokens.shape[1]
    place = score.sort(dim=1, descending=True, stable=True).indices.argsort(1)
    newest = n - 1 - tokens.flip(1).sort(dim=1, descending=True, stable=True).indices
    rank = place.gather(1, cluster).gather(1, newest)
    order = newest.gather(1, rank.sort(dim=1, stable=True).indices)
    worth = torch.arange(n, 0, -1, device=tokens.device, dtype=torch.float32).expand_as(tokens)
    return torch.empty_like(tokens, dtype=torch.float32).scatter_(1, order, worth)
