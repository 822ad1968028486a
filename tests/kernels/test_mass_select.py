"""Pages by attention mass: the fit, the share that is reached, and the kernels against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from paged import DEVICE, Paged, fill_index, make

from vllm_ext.kernels import reference_clusters, reference_mass
from vllm_ext.kernels.reference import grouped
from vllm_ext.kernels.reference_mass import Mass

SINK, LOCAL = 1, 2


def test_fit_recovers_a_curve() -> None:
    """Segment means of a / x + b give back a and b, and the integral is that of the curve."""
    ranks = (20, 100, 110, 600, 610)
    means = [sum(3 / (x + 1) + 0.002 for x in range(s, e)) / (e - s) for s, e in ((100, 110), (600, 610))]
    a, b = reference_mass.fit(*means, ranks)
    assert a == pytest.approx(3, rel=2e-3)
    assert b == pytest.approx(0.002, rel=2e-2)
    total = sum(3 / (x + 1) + 0.002 for x in range(20, 1000))
    assert reference_mass.fitted_mass(a, b, 20, 1000) == pytest.approx(total, rel=2e-3)
    assert reference_mass.fitted_mass(1.0, -0.01, 10, 1000) == pytest.approx(math.log(100 / 10.5) - 0.01 * 89.5)


def test_shortest_prefix() -> None:
    ranks = (4, 4, 4, 4, 4)
    head = [5.0, 3.0, 1.0, 1.0]
    assert reference_mass.kept_ranks(10, head, 0, 0, ranks, 4, 0.5) == 0
    assert reference_mass.kept_ranks(10, head, 0, 0, ranks, 4, 0.75) == 1
    assert reference_mass.kept_ranks(10, head, 0, 0, ranks, 4, 0.9) == 2
    assert reference_mass.kept_ranks(10, head, 0, 0, ranks, 4, 1.0) == 4


def peaked(p: Paged, seed: int = 0) -> None:
    """Keys whose logits decay as in real heads: a few pages hold most of the mass."""
    gen = torch.Generator().manual_seed(seed)
    h = p.k_cache.shape[1]
    mean = torch.nn.functional.normalize(p.q.float().view(p.q.shape[0], h, -1, p.q.shape[2]).mean((0, 2)), dim=-1)
    p.k_cache.mul_(0.3)
    strength = torch.rand(p.k_cache.shape[0], h, 1, generator=gen).to(DEVICE).pow(6) * 12
    p.k_cache.add_((strength * mean[None])[:, :, None].to(p.k_cache.dtype))


def fill_clusters(p: Paged, clusters: int) -> None:
    """Records of all complete pages."""
    for r, n in enumerate(p.lens):
        pages = p.block_table[r, : n // p.page].long()
        p.index[pages] = reference_clusters.record(p.k_cache[pages], clusters, 10)


def lists(p: Paged, r: int, capacity: int, target: Mass, clusters: int = 0):
    n, rows = p.lens[r], grouped(p.q[p.starts[r] : p.starts[r + 1]], p.k_cache.shape[1])
    pages = p.block_table[r, : -(-n // p.page)].long()
    records = p.index[pages].transpose(0, 1)
    scores = rows @ records[:, :, 0].transpose(1, 2) * p.scale
    if clusters:
        scores = reference_clusters.scores(rows, records, n // p.page, p.scale)
    rows = slice(p.starts[r], p.starts[r + 1])
    return reference_mass.select_mass(
        p.q[rows], p.k_cache, scores, pages, n, p.scale, capacity, SINK, LOCAL, target
    )  # fmt: skip


@pytest.mark.parametrize("mass", [0.5, 0.9])
def test_lists_hold_about_the_mass(mass: float) -> None:
    """True mass of the lists, over heads: near the target, and a higher target reads more."""
    p = make([16 * 128], [1], 8, 1, 64, 16, records=1)
    peaked(p)
    fill_index(p, "mean")
    ids, counts, _, cut = lists(p, 0, 128, Mass(mass))
    assert cut == 0
    pages = p.block_table[0, :128].long()
    keys = p.k_cache[pages].transpose(0, 1).float()
    w = (torch.einsum("hd,hnpd->hnp", p.q[0].float(), keys) * p.scale).flatten(1).softmax(-1).view(8, 128, 16).sum(-1)
    held = torch.stack([w[h, ids[h, : counts[h]].long()].sum() for h in range(8)])
    print(mass, held.tolist(), counts.tolist())
    assert (held > mass - 0.15).all()
    assert held.mean() > mass - 0.05
    assert counts.float().mean() < 100


SHAPES = {
    "two_requests": ([16 * 60 + 5, 16 * 33], [1, 1], 2, 2, 64, 16),
    "drafts_group_3": ([16 * 50 + 3], [2], 1, 3, 64, 16),
    "few_pages": ([16 * 5 + 1, 40, 90], [1, 1, 1], 1, 2, 80, 16),
    "all_forced": ([48, 16 * 20 + 1], [1, 1], 1, 2, 64, 16),
}
LONG = {"long_and_short": ([16 * 301 + 7, 16 * 200], [1, 1], 1, 2, 64, 16)}
"""Rows sorted as a block, and as a quarter of it."""


@pytest.mark.parametrize(("mass", "capacity"), [(0.8, 64), (0.95, 12), (1.0, 64), (1.0, 12)])
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_equal_reference(name: str, mass: float, capacity: int) -> None:
    compare(name, mass, capacity, 0)


@pytest.mark.parametrize("name", SHAPES)
def test_kernels_equal_reference_with_clusters(name: str) -> None:
    compare(name, 0.8, 64, 2)


@pytest.mark.parametrize("mass", [0.6, 1.0])
def test_long_and_short_rows(mass: float) -> None:
    compare("long_and_short", mass, 64, 0)


def test_equal_pages_are_ranked_in_order() -> None:
    """Pages of three kinds, hence scores that tie, also where a list is cut."""
    compare("two_requests", 0.6, 20, 0, kinds=3)


@pytest.mark.parametrize(
    "target", [Mass(), Mass(0.9, 0.05, 0.03), Mass(0.9, 0.0, 0.1), Mass(0.9, 0.97, 0.01), Mass(1, 1, 0)]
)
def test_room_for_probes(target: Mass) -> None:
    """No number of free pages has more ranks to probe than the buffers have room for."""
    for free in range(1, 700):
        head, start, end, second, last = target.ranks(free)
        probes = head + end - start + last - second
        assert probes <= min(free, target.most_ranks(free))
        assert target.most_ranks(free) <= target.most_ranks(free + 1)


def compare(name: str, mass: float, capacity: int, clusters: int, kinds: int = 0) -> None:
    """Lists and counters of the kernels and of the reference."""
    from vllm_ext.kernels.mass_select import MassBuffers, mass_select, probe_room

    lens, queries, h, g, d, page = (SHAPES | LONG)[name]
    p = make(lens, queries, h, g, d, page, records=clusters + 1)
    peaked(p)
    if kinds:
        p.k_cache.copy_(p.k_cache[torch.arange(p.k_cache.shape[0]) % kinds].clone())
    if clusters:
        fill_clusters(p, clusters)
    else:
        fill_index(p, "mean")
    most = 1024 if max(lens) > 64 * page else 64
    target, m = Mass(mass, 0.05, 0.03), max(queries)
    probes = probe_room(target, most, page, m, SINK, LOCAL)
    buffers = MassBuffers.allocate(len(lens), h, m * g, most, capacity, probes, DEVICE)
    stats = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    dense = torch.zeros(len(lens), dtype=torch.int32, device=DEVICE)
    ids, pages, counts = mass_select(
        p.q, p.k_cache, p.index, p.block_table, p.seq_lens, p.query_start_loc, dense, p.slot_mapping, stats, buffers,
        target, max_query_len=m, scale=p.scale, dense_limit=41, capacity=capacity, sink=SINK, local=LOCAL,
        clusters=clusters, iterations=10,
    )  # fmt: skip
    assert (buffers.ticket == 0).all()
    probes = cuts = listed = 0
    for r, n in enumerate(lens):
        if n <= 41:
            assert (counts[r] == -1).all()
            continue
        want, sizes, probed, cut = lists(p, r, capacity, target, clusters)
        assert counts[r].tolist() == sizes.tolist()
        for i in range(h):
            c = int(sizes[i])
            assert ids[r, i, :c].tolist() == want[i, :c].tolist()
            assert torch.equal(pages[r, i, :c], p.block_table[r][want[i, :c].long()])
        probes, cuts, listed = probes + probed, cuts + cut, listed + int(sizes.sum())
    assert stats[3] == listed
    assert stats[6] == probes * page * d * 4
    assert stats[7] == cuts
