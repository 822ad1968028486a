"""Every attention method, kernels against references: prompts in chunks, decode steps with drafts, growing lengths."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from learned import gates, roles
from paged import DEVICE, Paged, make

from vllm_ext import catalogue
from vllm_ext.attention_backends.stages import DecodeBatch, StageDims, Stages, request_counts
from vllm_ext.kernels import reference
from vllm_ext.kernels.sparse_decode import splits_for

HEADS, GROUP, SIZE, LAYER = 1, 3, 64, 2
BASE = {"page_size": 16, "sink": 1, "local": 2, "dense_layers": []}
PAGES, OVER = (13, 2, 6), (5, 3, 1)
"""Full pages and further keys of each request at the end; the second one stays below `dense_below`."""
STEPS = ((1, 1, 1), (3, 1, 2), (1, 1, 1))
"""Query tokens of each request in the decode steps that lead there; the last request completes a page on the way."""

# Options beside BASE; a method that needs files or other shapes says so here.
METHODS: dict[str, dict[str, Any]] = {
    "quest": {},
    "oracle_topk": {},
    "streaming": {},
    "vattention": {"pilot": 20, "epsilon": 0.1},
    "tactic": {"mass": 0.5},
    "tactic kmeans": {"mass": 0.5, "centroids": "kmeans", "cluster_size": 8},
    "resa": {"min_queries": 20, "gate": None},
    "infllm_v2": {"page_size": 64},
    "retro": {},
    "seer": {"gates": gates(LAYER + 1, HEADS, GROUP, SIZE, SIZE, 16)},
    "lychee": {"roles": roles(LAYER + 1, HEADS, GROUP, SIZE)},
    "lychee recent": {"roles": roles(LAYER + 1, HEADS, GROUP, SIZE), "others": "recent"},
}
"""A further row of a method has a word behind the name."""
IDENTICAL: dict[str, dict[str, Any]] = {"resa weighing nothing": {"min_queries": 20, "lambda_": 0.0}}
"""Further rows that must read and answer as their host does."""
COVERING: dict[str, dict[str, Any]] = {"tactic": {"mass": 1.0}}
"""Options beside a budget for every page that make a method dense."""
LAYERS = {"lychee": (LAYER - 1, LAYER)}
"""Layers of a step where it takes more than one: the first one reads every key."""
names = pytest.mark.parametrize("name", METHODS)


def test_every_method_has_a_row() -> None:
    assert {n.split()[0] for n in METHODS} == {n for n, p in catalogue.load().items() if p.kind == "attention"}


def stages(name: str, pages: int, dense: bool) -> Stages:
    """The stages of a method with lists of `pages` pages; `dense`: short requests are dense, the others sparse."""
    plugin = name.split()[0]
    options = BASE | (METHODS | IDENTICAL)[name] | ({} if dense else COVERING.get(plugin, {}))
    page = options["page_size"]
    limit = 3 * page if dense else 0
    method = catalogue.get(plugin).cls()(**options | {"budget": pages * page, "dense_below": limit})
    dims = StageDims(
        HEADS * GROUP, HEADS, SIZE, len(PAGES), 16 * page, 3, DEVICE, torch.float32, LAYERS.get(plugin, (LAYER,))
    )
    return method.stages(dims)


def batch(p: Paged, lens: list[int], queries: list[int], prompt: bool = False) -> DecodeBatch:
    """The step after which `lens` keys are in the cache; requests without query tokens are not in it."""
    starts = [0]
    slots: list[int] = []
    for r, (n, m) in enumerate(zip(lens, queries)):
        starts.append(starts[-1] + m)
        table = p.block_table[r].tolist()
        slots += [table[i // p.page] * p.page + i % p.page for i in range(n - m, n)]
    ints = {"dtype": torch.int32, "device": DEVICE}
    seq = [n if m else 0 for n, m in zip(lens, queries)]
    flags = torch.full((len(lens),), int(prompt), **ints)
    return DecodeBatch(
        p.block_table, torch.tensor(seq, **ints), torch.tensor(starts, **ints),
        torch.tensor(slots, dtype=torch.int64, device=DEVICE), flags, starts[-1], max(queries) if prompt else 3,
    )  # fmt: skip


@dataclass
class Run:
    """Outputs of the decode steps, what dense attention gives, counters at the end, and the index."""

    outs: list[torch.Tensor]
    dense: list[torch.Tensor]
    stats: list[int]
    index: torch.Tensor


@lru_cache
def run(name: str, pages: int, dense: bool, kernels: bool, warm: bool = False) -> Run:
    """A prompt in two chunks, then the decode steps, by kernels (`warm`: launched before) or references."""
    s = stages(name, pages, dense)
    page, size = s.method.page_size, s.method.record_elements(SIZE) // SIZE
    ends = [a * page + b for a, b in zip(PAGES, OVER)]
    p = make(ends, [1] * len(ends), HEADS, GROUP, SIZE, page, records=max(size, 1))
    p.k_cache.mul_(0.2)
    index = p.index.zero_() if size else None
    if kernels:
        s.allocate()
    gen = torch.Generator().manual_seed(0)

    def queries(tokens: int) -> torch.Tensor:
        return torch.randn(tokens, HEADS * GROUP, SIZE, generator=gen).to(DEVICE)

    prompts = [n - sum(step[r] for step in STEPS) for r, n in enumerate(ends)]
    halves = [n // 2 for n in prompts]
    for lens, m in ((halves, halves), (prompts, [a - b for a, b in zip(prompts, halves)])):
        b = batch(p, lens, m, True)
        write = s.write_index if kernels else s.reference_index
        write(LAYER, queries(b.tokens), p.k_cache, p.v_cache, index, b, p.scale)
    found = Run([], [], [], p.index.zero_() if index is None else index)
    lens = prompts
    for step in STEPS:
        lens = [n + m for n, m in zip(lens, step)]
        b = batch(p, lens, list(step))
        q = queries(b.tokens)
        out = torch.full_like(q, float("nan"))
        if warm and not s.warm:
            s.warm_up(q, p.k_cache, p.v_cache, index, p.block_table, p.scale)
        decode = s.decode if kernels else s.reference_decode
        for layer in s.dims.layers:
            decode(layer, q, p.k_cache, p.v_cache, index, b, out, p.scale)
        found.outs.append(out)
        exact = torch.empty_like(q)
        for row in s.rows(b, page):
            at = row.tokens
            exact[at] = reference.sparse_attention(q[at], p.k_cache, p.v_cache, row.pages, None, row.n, p.scale)[0]
        found.dense.append(exact)
    found.stats = s.stats.tolist()
    return found


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative error, norm over norm."""
    return ((a - b).norm() / b.norm()).item()


@names
def test_kernels_equal_references(name: str) -> None:
    got, want = (run(name, 5, True, kernels) for kernels in (True, False))
    assert max(error(a, b) for a, b in zip(got.outs, want.outs)) < 1e-3
    assert torch.allclose(got.index, want.index, atol=1e-5)
    assert got.stats[1:6] == want.stats[1:6]
    assert abs(got.stats[0] - want.stats[0]) <= 0.005 * want.stats[0]  # a sample may differ by a draw in fp32
    assert abs(got.stats[6] - want.stats[6]) <= 0.01 * want.stats[6]
    steps = len(STEPS) * HEADS * len(LAYERS.get(name.split()[0], (LAYER,)))
    assert want.stats[4:6] == [steps * 2, steps]
    assert 0 < want.stats[0] < want.stats[1]
    assert max(error(a, b) for a, b in zip(want.outs, want.dense)) > 1e-4  # the lists did leave something out


@names
def test_warming_up_changes_nothing(name: str) -> None:
    plain, warm = run(name, 5, True, True), run(name, 5, True, True, True)
    assert all(torch.equal(a, b) for a, b in zip(plain.outs, warm.outs))
    assert torch.equal(plain.index, warm.index)
    assert plain.stats == warm.stats


def test_request_counts_make_every_kernel() -> None:
    for most, heads in ((1, 1), (24, 8), (300, 1)):
        kernels = {splits_for(n * heads) for n in range(1, most + 1)}
        assert {splits_for(n * heads) for n in request_counts(most, heads)} == kernels
        assert max(request_counts(most, heads)) <= most


@names
@pytest.mark.parametrize("kernels", [False, True])
def test_room_for_every_page_is_dense(name: str, kernels: bool) -> None:
    found = run(name, 16, False, kernels)
    assert max(error(a, b) for a, b in zip(found.outs, found.dense)) < 1e-5
    assert found.stats[0] == found.stats[1]
    assert found.stats[5] == 0


@names
@pytest.mark.parametrize("kernels", [False, True])
def test_short_requests_are_exact(name: str, kernels: bool) -> None:
    found = run(name, 5, True, kernels)
    for step, a, b in zip(STEPS, found.outs, found.dense):
        rows = slice(step[0], step[0] + step[1])  # of the second request
        assert torch.allclose(a[rows], b[rows], atol=1e-5)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("name", IDENTICAL)
def test_without_its_own_part_a_method_is_its_host(name: str, kernels: bool) -> None:
    found, host = run(name, 5, True, kernels), run("quest", 5, True, kernels)
    assert max(error(a, b) for a, b in zip(found.outs, host.outs)) < 1e-6
    assert found.stats[:6] == host.stats[:6]
    assert max(error(a, b) for a, b in zip(found.outs, found.dense)) > 1e-4
