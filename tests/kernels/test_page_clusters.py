"""Clusters of a page's keys: records by definition, kernels against the reference, the estimate of a page's mass."""

from __future__ import annotations

import math

import pytest
import torch
from paged import DEVICE, make

from vllm_ext.kernels import reference_clusters
from vllm_ext.kernels.page_clusters import update_clusters

ROUNDS = 10


def blobs(pages: int, page: int, d: int, count: int, spread: float = 0.1, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Keys [pages, page, d] around `count` centres a page, in random order; their centres' numbers; the centres."""
    gen = torch.Generator().manual_seed(seed)
    centres = torch.randn(pages, count, d, generator=gen) * 2
    number = torch.arange(page).remainder(count).expand(pages, -1)
    number = number.gather(1, torch.rand(pages, page, generator=gen).argsort(1))
    keys = centres.gather(1, number[..., None].expand(-1, -1, d)) + spread * torch.randn(pages, page, d, generator=gen)
    return keys, number, centres


def test_clusters_are_found() -> None:
    """Four blobs of 12 to 20 keys: each centroid is the mean of one of them, whatever the order of the keys."""
    keys, number, _ = blobs(5, 64, 32, 4)
    found = reference_clusters.record(keys, 4, ROUNDS)
    for i in range(5):
        means = torch.stack([keys[i, number[i] == c].mean(0) for c in range(4)])
        near = torch.cdist(means, found[i, :4])
        assert sorted(near.argmin(1).tolist()) == [0, 1, 2, 3]
        assert near.amin(1).max() < 1e-5
    assert (found[:, 4, :4].sum(-1) == 64).all()
    assert (found[:, 4, 4:] == 0).all()


def test_a_settled_record_is_a_fixed_point() -> None:
    """After enough rounds each centroid is the mean of the keys nearest to it, and more rounds change nothing."""
    keys = torch.randn(8, 32, 16, generator=torch.Generator().manual_seed(1))
    found = reference_clusters.record(keys, 4, 50)
    assert torch.equal(found, reference_clusters.record(keys, 4, 100))
    nearest = torch.cdist(keys, found[:, :4]).argmin(-1)
    for i in range(8):
        for c in range(4):
            mine = keys[i, nearest[i] == c]
            assert len(mine) == found[i, 4, c]
            torch.testing.assert_close(mine.mean(0), found[i, c], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("page", "d", "clusters", "dtype"),
    [(16, 64, 2, torch.float32), (64, 80, 4, torch.float32), (32, 64, 2, torch.float16), (128, 64, 16, torch.float32)],
)
def test_kernel_equals_reference(page: int, d: int, clusters: int, dtype: torch.dtype) -> None:
    """Records of the pages that the step completes, and of no other page."""
    p = make([page * 2, page - 1, page + 3], [page + 1, 1, 4], 2, 1, d, page, dtype, records=clusters + 1)
    p.index.fill_(-7)
    want = p.index.clone()
    reference_clusters.update(p.k_cache, want, p.slot_mapping, clusters, ROUNDS)
    update_clusters(p.k_cache, p.index, p.slot_mapping, clusters, ROUNDS)
    done = [*p.block_table[0, :2].tolist(), p.block_table[2, 0].item()]
    touched = (want != -7).flatten(1).any(1).nonzero().flatten().tolist()
    assert touched == sorted(done)
    counts = p.index[done][:, :, clusters, :clusters]
    assert (counts.sum(-1) == page).all()
    assert torch.equal(counts, want[done][:, :, clusters, :clusters])
    same = p.index.clone()
    same[:, :, clusters, clusters:] = want[:, :, clusters, clusters:]  # not written, not read
    torch.testing.assert_close(same, want, atol=1e-5 if dtype == torch.float32 else 2e-3, rtol=0)


def test_records_depend_on_the_keys_of_the_page_alone() -> None:
    """The same keys on another page, completed in another step beside other requests: the same bytes."""
    page, d = 32, 64
    a = make([page * 2], [page * 2], 2, 1, d, page, records=3)
    b = make([page * 3, page * 2 + 5], [1, page + 5], 2, 1, d, page, records=3, seed=1)
    source, target = a.block_table[0, 0].item(), b.block_table[1, 1].item()
    b.k_cache[target] = a.k_cache[source]
    for p in (a, b):
        update_clusters(p.k_cache, p.index, p.slot_mapping, 2, ROUNDS)
    assert torch.equal(a.index[source][:, :2], b.index[target][:, :2])
    assert torch.equal(a.index[source][:, 2, :2], b.index[target][:, 2, :2])


@pytest.mark.parametrize("kernel", [False, True])
def test_equal_keys_make_one_cluster(kernel: bool) -> None:
    """The others are empty: they count nothing, and the score is finite."""
    page, d = 32, 64
    p = make([page], [1], 1, 1, d, page, records=5)
    p.k_cache[p.block_table[0, 0]] = torch.linspace(-1, 1, d, device=DEVICE)
    update = update_clusters if kernel else reference_clusters.update
    update(p.k_cache, p.index, p.slot_mapping, 4, ROUNDS)
    records = p.index[p.block_table[0, :1].long()].transpose(0, 1)
    assert records[0, 0, 4, :4].tolist() == [page, 0, 0, 0]
    rows = p.q.float().transpose(0, 1)
    s = reference_clusters.scores(rows, records, 1, p.scale)
    want = (rows[0, 0] @ p.k_cache[p.block_table[0, 0], 0, 0]) * p.scale + math.log(page)
    torch.testing.assert_close(s[0, 0, 0], want)


def masses(keys: torch.Tensor, rows: torch.Tensor, clusters: int, scale: float) -> tuple[torch.Tensor, ...]:
    """Log mass [R, N] of pages of keys [N, P, D]: by mean key, by clusters, exact."""
    record = reference_clusters.record(keys[:, None], clusters, ROUNDS).transpose(0, 1)
    by_clusters = reference_clusters.scores(rows[None], record, len(keys), scale)[0]
    by_mean = rows @ keys.mean(1).T * scale + math.log(keys.shape[1])
    return by_mean, by_clusters, torch.einsum("rd,npd->rnp", rows, keys).mul(scale).logsumexp(-1)


@pytest.mark.parametrize("clusters", [2, 4, 8])
def test_estimate_lies_between_mean_key_and_truth(clusters: int) -> None:
    gen = torch.Generator().manual_seed(2)
    keys, rows = torch.randn(40, 64, 32, generator=gen), torch.randn(6, 32, generator=gen)
    low, estimate, exact = masses(keys, rows, clusters, 1.0)
    assert (estimate >= low - 1e-4).all()
    assert (estimate <= exact + 1e-4).all()
    assert (exact - estimate).mean() < 0.95 * (exact - low).mean()


def test_clustered_keys_are_estimated_well() -> None:
    """Pages of four tight clusters: the mean key misses most of the mass of the cluster that the query likes."""
    keys, _, _ = blobs(50, 64, 32, 4)
    rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    low, estimate, exact = masses(keys, rows, 4, 32**-0.5)
    assert (exact - estimate).abs().max() < 0.02
    assert (exact - low).mean() > 1
    order = [x.argsort(-1, descending=True)[:, :5] for x in (low, estimate, exact)]
    held = [exact.softmax(-1).gather(-1, x).sum(-1).mean() for x in order]
    assert held[1] > 0.999 * held[2]
    assert held[0] < held[1]
