"""K-means over the keys of a page, in one program: the record of pages that a step completes, and scores from it.

Specification: `reference_clusters`. One program serves a page and KV head; its centroids live in the record itself from
round to round (few registers, any head size), and the rounds end when no key changes its cluster.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MOST = 16
"""Most clusters a page: the smallest side of a matrix-unit tile."""
_CP = tl.constexpr(MOST)


@triton.jit
def _distances(K, src, k_tok, at, MEAN: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    """Squared distances [P] of the page's keys to key `at`, or to their mean; 64 channels at a time (few registers)."""
    rp = tl.arange(0, P)
    rc = tl.arange(0, 64)
    found = tl.zeros([P], tl.float32)
    for c in range(0, D, 64):
        ok = c + rc < D
        keys = tl.load(K + src + rp[:, None] * k_tok + (c + rc)[None, :], mask=ok[None, :], other=0.0).to(tl.float32)
        if MEAN:
            one = tl.sum(keys, 0) / P
        else:
            one = tl.load(K + src + at * k_tok + c + rc, mask=ok, other=0.0).to(tl.float32)
        gap = keys - one[None, :]
        found += tl.sum(gap * gap, 1)
    return found


@triton.jit
def _farthest(K, src, k_tok, C: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    """Tokens [MOST] at which the clusters start; 0 behind C."""
    starts = tl.zeros([_CP], tl.int32)
    near = _distances(K, src, k_tok, 0, True, P, D)
    for c in range(0, C):
        at = tl.argmax(near, 0).to(tl.int32)
        starts = tl.where(tl.arange(0, _CP) == c, at, starts)
        far = _distances(K, src, k_tok, at, False, P, D)
        near = tl.where(c == 0, far, tl.minimum(near, far))
    return starts


@triton.jit
def cluster_record(
    K, INDEX, page, head, k_page, k_head, k_tok, i_page, i_head, iterations,
    C: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write the record of one full page and KV head: C centroids, then a row that begins with their counts."""
    rp = tl.arange(0, P)
    rd = tl.arange(0, 64)
    rc = tl.arange(0, _CP)
    src = page * k_page + head * k_head
    dst = INDEX + page * i_page + head * i_head
    starts = _farthest(K, src, k_tok, C, P, D)
    for c in range(0, D, 64):
        held = (rc < C)[:, None] & (c + rd < D)[None, :]
        chosen = tl.load(K + src + starts[:, None] * k_tok + (c + rd)[None, :], mask=held, other=0.0)
        tl.store(dst + rc[:, None] * D + (c + rd)[None, :], chosen, mask=held)
    counts = tl.zeros([_CP], tl.float32)
    cluster = tl.full([P], -1, tl.int32)
    moved = 1
    t = 0
    while (t < iterations) & (moved > 0):
        tl.debug_barrier()  # centroids that other threads wrote
        x = tl.zeros([P, _CP], tl.float32)
        norm = tl.zeros([_CP], tl.float32)
        for c in range(0, D, 64):
            ok = (c + rd < D)[None, :]
            centroids = tl.load(dst + rc[:, None] * D + (c + rd)[None, :], mask=(rc < C)[:, None] & ok, other=0.0)
            keys = tl.load(K + src + rp[:, None] * k_tok + (c + rd)[None, :], mask=ok, other=0.0)
            wide = centroids.to(tl.float32)
            norm += tl.sum(wide * wide, 1)
            x = tl.dot(keys, tl.trans(centroids), x, input_precision="ieee")
        x = tl.where((rc < C)[None, :], x - (norm / 2)[None, :], float("-inf"))
        nearest = tl.argmax(x, 1).to(tl.int32)
        moved = tl.sum((nearest != cluster).to(tl.int32), 0)
        cluster = nearest
        member = cluster[None, :] == rc[:, None]
        counts = tl.sum(member.to(tl.float32), 1)
        tl.debug_barrier()  # everyone has read the old centroids
        for c in range(0, D, 64):
            ok = (c + rd < D)[None, :]
            keys = tl.load(K + src + rp[:, None] * k_tok + (c + rd)[None, :], mask=ok, other=0.0)
            total = tl.dot(member.to(keys.dtype), keys, input_precision="ieee")
            means = (total / tl.maximum(counts, 1.0)[:, None]).to(keys.dtype)
            tl.store(dst + rc[:, None] * D + (c + rd)[None, :], means, mask=(counts > 0)[:, None] & ok)
        t += 1
    tl.store(dst + C * D + rc, counts.to(INDEX.dtype.element_ty), mask=rc < C)


@triton.jit
def tile_clusters(
    q, INDEX, BT, tile, head, n, scale, i_page, i_head,
    C: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Estimated log mass of every complete page of the tile: [ROWS, TILE], -inf for others."""
    page = tile * TILE + tl.arange(0, TILE)
    rd = tl.arange(0, DP)
    complete = page < n // P
    phys = tl.load(BT + page, mask=complete, other=0).to(tl.int64)
    at = INDEX + phys * i_page + head * i_head
    top = tl.full([ROWS, TILE], -1e30, tl.float32)
    den = tl.zeros([ROWS, TILE], tl.float32)
    for c in range(0, C):
        ok = complete[None, :] & (rd < D)[:, None]
        centroids = tl.load(at[None, :] + c * D + rd[:, None], mask=ok, other=0.0)
        count = tl.load(at + C * D + c, mask=complete, other=0.0).to(tl.float32)
        x = tl.dot(q, centroids, input_precision="ieee") * scale
        x = tl.where((count > 0)[None, :], x + tl.log(tl.maximum(count, 1.0))[None, :], -1e30)
        new = tl.maximum(top, x)
        den = den * tl.exp(top - new) + tl.exp(x - new)
        top = new
    return tl.where(complete[None, :], top + tl.log(tl.maximum(den, 1.0)), float("-inf"))


@triton.jit(do_not_specialize_on_alignment=["SLOTS"])
def _update_clusters(
    K, INDEX, SLOTS, k_page, k_head, k_tok, i_page, i_head, iterations,
    C: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    slot = tl.load(SLOTS + tl.program_id(0)).to(tl.int64)
    if slot >= 0 and slot % P == P - 1:
        cluster_record(
            K, INDEX, slot // P, tl.program_id(1), k_page, k_head, k_tok, i_page, i_head, iterations, C, P, D
        )


def update_clusters(k_cache: Tensor, index: Tensor, slot_mapping: Tensor, clusters: int, iterations: int) -> None:
    """See `reference_clusters.update`; one program per token and KV head, most leave at once. No host sync."""
    tokens, heads = slot_mapping.shape[0], k_cache.shape[1]
    if not tokens:
        return
    _update_clusters[(tokens, heads)](
        k_cache, index, slot_mapping, k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), index.stride(0),
        index.stride(1), iterations, C=clusters, P=k_cache.shape[2], D=k_cache.shape[3], num_warps=4,
    )  # fmt: skip
