"""Plain-PyTorch specification of `page_clusters`: K-means over the keys of one page (after Tactic, section 4.1).

The record of a page is [C + 1, D] in the dtype of the keys: C mean keys, and a row that begins with their C counts.
Shapes as in `reference`. Clusters end at the page, so the record depends on the page's keys alone, and the clusters'
counts give a lower bound of the page's attention mass, no lower than the one that its mean key gives (Jensen).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def record(keys: Tensor, clusters: int, iterations: int) -> Tensor:
    """Records of full pages: `keys` [..., P, D] -> [..., C + 1, D].

    Lloyd's algorithm for at most `iterations` rounds, in fp32 with centroids rounded to the dtype of the keys. It
    starts at the key farthest from the page's mean, then at the key farthest from all starts so far, ties to the first:
    outliers, which can hold most of the mass, come into clusters of their own. Ties between clusters go to the lower
    one; an empty cluster keeps its centroid and counts 0.
    """
    k, dtype = keys.float(), keys.dtype
    starts, near = [], _distance(k, k.mean(-2, keepdim=True))
    for c in range(clusters):
        starts.append(_row(k, near.argmax(-1)))
        far = _distance(k, starts[-1])
        near = far if c == 0 else torch.minimum(near, far)
    centroids = torch.cat(starts, -2)
    counts = centroids.new_zeros(centroids.shape[:-1])
    for _ in range(iterations):
        closeness = k @ centroids.transpose(-1, -2) - centroids.square().sum(-1)[..., None, :] / 2
        member = torch.nn.functional.one_hot(closeness.argmax(-1), clusters).to(k.dtype)  # [..., P, C]
        counts = member.sum(-2)
        means = (member.transpose(-1, -2) @ k) / counts.clamp(min=1)[..., None]
        centroids = torch.where(counts[..., None] > 0, means.to(dtype).float(), centroids)
    last = torch.zeros_like(centroids[..., :1, :])
    last[..., 0, :clusters] = counts
    return torch.cat([centroids, last], -2).to(dtype)


def update(k_cache: Tensor, index: Tensor, slot_mapping: Tensor, clusters: int, iterations: int) -> None:
    """Recompute, in place, the record of every page that a token of this step completes (`reference.update_index`)."""
    page = k_cache.shape[2]
    done = slot_mapping[(slot_mapping >= 0) & (slot_mapping % page == page - 1)] // page
    if done.numel():
        index[done] = record(k_cache[done], clusters, iterations)


def scores(rows: Tensor, records: Tensor, complete: int, scale: float) -> Tensor:
    """Estimated log mass of pages: rows [H, R, D] fp32, records [H, N, C + 1, D] -> [H, R, N] fp32.

    `log sum_c count_c exp(scale * q . centroid_c)`; -inf from page `complete` on, which have no record.
    """
    clusters = records.shape[2] - 1
    centroids, counts = records[:, :, :-1].float(), records[:, :, -1, :clusters].float()
    logits = torch.einsum("hrd,hncd->hrnc", rows, centroids) * scale + counts.log()[:, None]
    s = logits.logsumexp(-1)
    s[:, :, complete:] = -math.inf
    return s


def _distance(keys: Tensor, one: Tensor) -> Tensor:
    """Squared distance of every key [..., P, D] to one vector [..., 1, D]: [..., P]."""
    return (keys - one).square().sum(-1)


def _row(keys: Tensor, at: Tensor) -> Tensor:
    """Key `at` [...] of keys [..., P, D]: [..., 1, D]."""
    return keys.gather(-2, at[..., None, None].expand(*at.shape, 1, keys.shape[-1]))
