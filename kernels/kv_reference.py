"""Plain-torch definitions of what eviction computes: window attention, its reductions, the choice and the compaction.

Shapes: L layers, H KV heads, Hq = H * G query heads, w window queries, n resident tokens in order of position, head
size D.
"""

from __future__ import annotations

import torch
from torch import Tensor


def window_attention(queries: Tensor, keys: Tensor, scale: float, *, visible: int | None = None) -> Tensor:
    """Causal attention of the last queries to all resident tokens.

    Args:
        queries: [L, w, Hq, D], of the w newest tokens.
        keys: [L, H, n, D]; the w newest are those of the queries.
        visible: resident tokens that query 0 sees; default n - w + 1.

    Returns:
        [L, Hq, w, n] fp32, rows sum to 1.
    """
    layers, w, hq, _ = queries.shape
    heads, n = keys.shape[1], keys.shape[2]
    q = queries.transpose(1, 2).reshape(layers, heads, hq // heads * w, -1)
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    logits = (q.to(dtype) @ keys.to(dtype).transpose(-1, -2)).view(layers, hq, w, n) * scale
    first = n - w + 1 if visible is None else visible
    hidden = torch.arange(n, device=keys.device)[None] >= first + torch.arange(w, device=keys.device)[:, None]
    return logits.masked_fill_(hidden, -torch.inf).softmax(-1)


def weighted_rows(attention: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_i weights_i * attention_i over the window; default weights 1 / w. [L, Hq, w, n] -> [L, Hq, n]."""
    if weights is None:
        return attention.mean(2)
    return torch.einsum("lhwn,w->lhn", attention, weights.to(attention))


def group_mean(x: Tensor, heads: int) -> Tensor:
    """Mean over the query heads of each of `heads` KV heads: [L, Hq, n] -> [L, H, n]."""
    return x.unflatten(1, (heads, -1)).mean(2)


def average_pool(x: Tensor, size: int) -> Tensor:
    """Average over `size` neighbours (odd) along the last axis; beyond the ends counts as zero."""
    if size == 1:
        return x
    flat = torch.nn.functional.avg_pool1d(x.reshape(-1, 1, x.shape[-1]), size, stride=1, padding=size // 2)
    return flat.view(x.shape)


def max_pool(x: Tensor, size: int) -> Tensor:
    """Maximum over `size` neighbours (odd) along the last axis."""
    if size == 1:
        return x
    flat = torch.nn.functional.max_pool1d(x.reshape(-1, 1, x.shape[-1]), size, stride=1, padding=size // 2)
    return flat.view(x.shape)


def worst_case(attention: Tensor, heads: int, pool: int = 1, columns: int | None = None) -> Tensor:
    """Largest attention of a token over window and GQA group, rows pooled first and rescaled to their mass.

    Args:
        attention: [L, Hq, w, n].
        heads: H.
        pool: tokens of the average pooling (odd).
        columns: only the first so many tokens count; default all.

    Returns:
        [L, H, columns] in the dtype of `attention`.
    """
    rows = attention[..., :columns]
    pooled = average_pool(rows, pool)
    mass = pooled.sum(-1, keepdim=True)
    pooled = pooled * torch.where(mass > 0, rows.sum(-1, keepdim=True) / mass, 1.0)
    return pooled.unflatten(1, (heads, -1)).amax((2, 3))


def choose(scores: Tensor, count: int, chosen: int, sinks: int, recent: int) -> Tensor:
    """The tokens that survive: forced ones, then the best; ties go to the newer token.

    Args:
        scores: [..., n] fp32.
        count: survivors among the first `chosen` tokens.
        chosen: tokens that may be evicted; those behind stay anyway.
        sinks: first tokens that always stay.
        recent: index from which tokens always stay.

    Returns:
        [..., count] int64 indices, ascending.
    """
    s = scores[..., :chosen].clone()
    s[..., :sinks] = torch.inf
    s[..., min(recent, chosen) :] = torch.inf
    newest_first = s.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return (chosen - 1 - newest_first).sort(-1).values


def compact(cache: Tensor, row: Tensor, kept: Tensor, first: int, target: int) -> None:
    """Move the survivors of a request to the slots from `target` on, in place.

    Args:
        cache: [num_blocks, H, P, C] view of keys, values or both, any strides.
        row: [blocks] block table of the request.
        kept: [H, k] resident indices, ascending; index 0 is slot `first`.
        first: first resident slot.
        target: slot of the first survivor; target + k - 1 >= first + kept[:, -1].
    """
    size = cache.shape[2]
    heads = torch.arange(cache.shape[1], device=cache.device)[:, None]
    source = kept + first
    moved = cache[row[source // size].long(), heads, source % size]
    slots = torch.arange(target, target + kept.shape[-1], device=cache.device)
    cache[row[slots // size].long(), heads, slots % size] = moved


def resident(cache: Tensor, row: Tensor, first: int, end: int) -> Tensor:
    """Slots [first, end) of a request: [H, end - first, C], a copy."""
    size = cache.shape[2]
    slots = torch.arange(first, end, device=cache.device)
    return cache[row[slots // size].long(), :, slots % size].transpose(0, 1)


def redundancy(keys: Tensor, threshold: float, recent: int, entries: int = 1 << 26) -> Tensor:
    """How much of a token its fellow tokens repeat, from the cosines of their keys.

    Args:
        keys: [L, H, n, D].
        threshold: cosine from which two tokens are near-duplicates.
        recent: newest near-duplicates of a token whose cosine is left out.
        entries: cosines that are worked out at once.

    Returns:
        [L, H, n] fp32, softmax over the tokens of their mean cosine to the others.
    """
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    n = keys.shape[2]
    rows = max(1, entries // (keys.shape[0] * keys.shape[1] * n))
    order = torch.arange(n, device=keys.device)
    mean = []
    for begin in range(0, n, rows):
        cosine = unit[:, :, begin : begin + rows] @ unit.transpose(-1, -2)
        own = order[begin : begin + rows, None] == order[None]
        cosine = cosine.masked_fill(own, 0.0)
        if recent:
            alike = torch.where((cosine > threshold) & ~own, order, -1)
            newest = alike.topk(min(recent, n), dim=-1).values
            cosine = cosine.scatter(-1, newest.clamp(min=0), cosine.gather(-1, newest.clamp(min=0)) * (newest < 0))
        mean.append(cosine.sum(-1) / n)
    return torch.cat(mean, -1).softmax(-1)
