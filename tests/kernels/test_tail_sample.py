"""Sampling of the tail: draws, budget, guarantee on the reference, and the kernels against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from paged import DEVICE, Paged, make

from vllm_ext.kernels import reference
from vllm_ext.kernels import reference_sampling as sampling
from vllm_ext.kernels.reference_sampling import Target

SEED, LAYER = 11, 3


def lists(p: Paged, keep: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Page lists of one request each, the same for every KV head; None entries read every page."""
    heads, longest = p.k_cache.shape[1], max(map(len, keep))
    ids = torch.full((len(keep), heads, longest), -1, dtype=torch.int32)
    counts = torch.zeros(len(keep), heads, dtype=torch.int32)
    for r, pages in enumerate(keep):
        ids[r, :, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        counts[r] = len(pages) or -1
    return ids.to(DEVICE), counts.to(DEVICE)


def listed(p: Paged, ids: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the lists by the reference."""
    out, lse = torch.zeros_like(p.q), torch.zeros(p.q.shape[:2], device=DEVICE)
    for r, n in enumerate(p.lens):
        rows, c = slice(p.starts[r], p.starts[r + 1]), int(counts[r, 0])
        pages = p.block_table[r, : -(-n // p.page)].long()
        chosen = None if c < 0 else ids[r, :, :c]
        out[rows], lse[rows] = reference.sparse_attention(p.q[rows], p.k_cache, p.v_cache, pages, chosen, n, p.scale)
    return out, lse


def expected(p: Paged, r: int, ids, counts, out, lse, target: Target, sizes=None):
    n, rows = p.lens[r], slice(p.starts[r], p.starts[r + 1])
    pages = p.block_table[r, : -(-n // p.page)].long()
    keys = [sampling.stream(SEED, n - rows.stop + rows.start, LAYER, h) for h in range(p.k_cache.shape[1])]
    return sampling.sample_tail(
        p.q[rows], p.k_cache, p.v_cache, pages, ids[r, :, : int(counts[r, 0])], n, p.scale, out[rows], lse[rows],
        keys, target, sizes,
    )  # fmt: skip


@pytest.mark.parametrize("size", [2, 3, 16, 100, 4096, 4097])
def test_draws_are_a_permutation(size: int) -> None:
    x = sampling.permutation(torch.arange(size), size, sampling.stream(1, 2, 3, 4))
    assert x.sort().values.equal(torch.arange(size))


def test_draws_are_uniform_and_depend_on_the_key() -> None:
    first = [int(sampling.permutation(torch.tensor([0]), 64, sampling.stream(0, p, 0, 0))) for p in range(6400)]
    counts = torch.bincount(torch.tensor(first), minlength=64)
    chi2 = ((counts - 100.0) ** 2 / 100).sum().item()
    assert chi2 < 63 + 5 * math.sqrt(126)
    a, b = (sampling.permutation(torch.arange(1000), 1000, sampling.stream(0, 5, layer, 0)) for layer in (0, 1))
    assert (a == b).sum() < 20


def test_tail_keys_are_the_keys_outside_the_list() -> None:
    ids = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    found = sampling.tail_keys(torch.arange(6 * 16), ids, 16).tolist()
    assert found == [i for i in range(160) if i // 16 not in (0, 3, 4, 9)]


def attention(weights: torch.Tensor, seed: int) -> Paged:
    """One request of 4,096 keys whose weights exp(logit) are given, one head, random values; on the CPU."""
    p = make([4096], [1], 1, 1, 64, 16, seed=seed)
    p.q, p.k_cache, p.v_cache, p.block_table = (x.cpu() for x in (p.q, p.k_cache, p.v_cache, p.block_table))
    logits = weights.log()[torch.randperm(4096, generator=torch.Generator().manual_seed(seed))]
    q = torch.nn.functional.normalize(p.q[0, 0], dim=0)
    p.q[0, 0] = q / p.scale
    order = p.block_table[0, :256].long()
    p.k_cache[order, 0] = (logits.view(256, 16, 1) * q).to(p.k_cache)
    return p


HEADS = {
    "flat": lambda g: torch.randn(4096, generator=g).mul(0.5).exp(),
    "peaked": lambda g: torch.cat([torch.full((10,), 400.0), torch.rand(4086, generator=g) + 0.5]),
    "heavy": lambda g: torch.randn(4096, generator=g).mul(1.5).exp(),
    "missed": lambda g: torch.cat([torch.full((40,), 400.0), torch.rand(4056, generator=g) + 0.5]),
}
# Shares of failures, errors above epsilon: least and most. 200 trials have a standard deviation of 0.02 at delta = 0.1.
# A pilot of 80 underestimates the variance of heavy tails, where the guarantee holds only roughly. It does not hold
# where the list misses rare keys of large weight ("missed": 24 of 3,840): most pilots see none of them.
FAILURES = {"flat": (0, 0.16), "peaked": (0, 0.16), "heavy": (0, 0.25), "missed": (0.3, 1)}


@pytest.mark.parametrize("guarantee", sampling.GUARANTEES)
@pytest.mark.parametrize("name", HEADS)
def test_the_guarantee(name: str, guarantee: str) -> None:
    target = Target(epsilon=0.1 if guarantee == "denominator" else 0.4, delta=0.1, guarantee=guarantee)
    failures, drawn, trials = 0, 0, 200
    gen = torch.Generator().manual_seed(0)
    p = attention(HEADS[name](gen), 0)
    pages = p.block_table[0, :256].long()
    ids = reference.select_pages(
        reference.page_scores(p.q, p.k_cache, None, pages, 4096, p.scale, "exact", "max"), 4096, 1, 16, 16, 1, 2
    )
    out, lse = reference.sparse_attention(p.q, p.k_cache, p.v_cache, pages, ids, 4096, p.scale)
    dense, level = reference.sparse_attention(p.q, p.k_cache, p.v_cache, pages, None, 4096, p.scale)
    order = torch.arange(240 * 16)
    values = p.v_cache[pages, 0].flatten(0, 1)
    logits = (p.k_cache[pages, 0].flatten(0, 1) @ p.q[0, 0]) * p.scale
    for trial in range(trials):
        key = sampling.stream(trial, 4095, 0, 0)
        at = sampling.tail_keys(sampling.permutation(order, 3840, key), ids[0], 16)
        first = at[: target.pilot_draws(3840)]
        b = sampling.sample_size(logits[None, first], values[first], out[:, 0], lse[:, 0], 3840, target)
        w = (logits[at[:b]] - lse[0, 0]).exp()
        total = 1 + 3840 * w.mean()
        if guarantee == "denominator":
            failures += abs(total / (level - lse)[0, 0].exp() - 1).item() > target.epsilon
        else:
            got = (out[0, 0] + 3840 * (w[:, None] * values[at[:b]]).mean(0)) / total
            failures += ((got - dense[0, 0]).norm() / dense[0, 0].norm()).item() > target.epsilon
        drawn += b
    print(f"{name} {guarantee}: {failures / trials:.3f} failures, {drawn / trials:.0f} of 3840 drawn")
    least, most = FAILURES[name]
    assert least <= failures / trials <= most
    assert drawn < trials * 3840


def test_numerator_and_denominator_are_unbiased() -> None:
    """Means over 400 seeds lie within 3.5 standard errors of the truth."""
    p = attention(HEADS["flat"](torch.Generator().manual_seed(1)), 1)
    pages = p.block_table[0, :256].long()
    logits = (p.k_cache[pages, 0].flatten(0, 1) @ p.q[0, 0]) * p.scale
    values = p.v_cache[pages, 0].flatten(0, 1)[:, 0]
    ids = torch.tensor([0, 254, 255], dtype=torch.int32)
    w = logits.double().exp()
    tail = sampling.tail_keys(torch.arange(253 * 16), ids, 16)
    truth = torch.stack([w[tail].sum(), (w[tail] * values[tail]).sum()])
    found = []
    for seed in range(400):
        at = tail[sampling.permutation(torch.arange(100), tail.numel(), sampling.stream(seed, 0, 0, 0))]
        found.append(torch.stack([w[at].mean(), (w[at] * values[at]).mean()]) * tail.numel())
    x = torch.stack(found)
    assert ((x.mean(0) - truth).abs() < 3.5 * x.std(0) / 20).all()


SHAPES = {
    "two_requests": ([300, 200], [1, 1], 2, 2, 64, 16, [[0, 3, 7, 17, 18], [0, 2, 11, 12]]),
    "drafts_group_3": ([500], [3], 1, 3, 64, 16, [[0, 9, 30, 31]]),
    "one_dense": ([100, 290, 64], [1, 1, 1], 1, 4, 80, 16, [[], [0, 5, 17, 18], [0, 1, 2, 3]]),
}


@pytest.mark.parametrize("guarantee", sampling.GUARANTEES)
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_equal_reference(name: str, guarantee: str) -> None:
    from vllm_ext.kernels.tail_sample import SampleBuffers, tail_sample

    lens, queries, h, g, d, page, keep = SHAPES[name]
    p = make(lens, queries, h, g, d, page)
    p.k_cache.mul_(0.15)
    ids, counts = lists(p, keep)
    out, lse = listed(p, ids, counts)
    m = max(queries)
    target = Target(epsilon=0.06, delta=0.1, guarantee=guarantee, pilot=20, cap=0.9)
    for splits in (1, 3):
        buffers = SampleBuffers.allocate(len(lens), h, m * g, d, DEVICE)
        stats = torch.zeros(8, dtype=torch.int64, device=DEVICE)
        got = out.clone()
        sizes = tail_sample(
            p.q, p.k_cache, p.v_cache, p.block_table, p.seq_lens, p.query_start_loc, p.slot_mapping, ids, counts, got,
            lse, stats, buffers, target, seed=SEED, layer=LAYER, max_query_len=m, scale=p.scale, splits=splits,
        )  # fmt: skip
        assert (buffers.ticket == 0).all()
        assert stats[0] == sizes.sum()
        total = cut = 0
        for r in range(len(lens)):
            rows = slice(p.starts[r], p.starts[r + 1])
            if counts[r, 0] < 0:
                assert torch.equal(got[rows], out[rows])
                continue
            want, drawn, cuts = expected(p, r, ids, counts, out, lse, target)
            assert all(abs(a - b) <= 1 + b // 200 for a, b in zip(sizes[r].tolist(), drawn))
            want, _, _ = expected(p, r, ids, counts, out, lse, target, sizes[r].tolist())
            assert ((got[rows] - want).norm() / want.norm()).item() < 1e-5
            total, cut = total + sum(drawn), cut + cuts
        assert stats[7] == cut
        assert name == "one_dense" or total > 25 * h * len(lens)


def test_the_whole_tail_is_dense() -> None:
    """Identity: b = n_s, on the reference and the kernels."""
    from vllm_ext.kernels.tail_sample import SampleBuffers, tail_sample

    p = make([300], [2], 2, 2, 64, 16)
    ids, counts = lists(p, [[0, 17, 18]])
    out, lse = listed(p, ids, counts)
    target = Target(pilot=10**6)
    pages = p.block_table[0, :19].long()
    dense, _ = reference.sparse_attention(p.q, p.k_cache, p.v_cache, pages, None, 300, p.scale)
    want, drawn, _ = expected(p, 0, ids, counts, out, lse, target)
    assert drawn == [256, 256]
    assert torch.allclose(want, dense, atol=1e-5)
    buffers = SampleBuffers.allocate(1, 2, 4, 64, DEVICE)
    stats = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    tail_sample(
        p.q, p.k_cache, p.v_cache, p.block_table, p.seq_lens, p.query_start_loc, p.slot_mapping, ids, counts, out, lse,
        stats, buffers, target, seed=0, layer=0, max_query_len=2, scale=p.scale,
    )  # fmt: skip
    assert torch.allclose(out, dense, atol=1e-5)
