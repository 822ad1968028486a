"""Every plan of `score_select` that scores several KV heads in a program makes the lists of the reference."""

from __future__ import annotations

import pytest
import torch
from paged import fill_index, make
from test_kernels import SHAPES, expected_list, run_select

from vllm_ext.kernels import reference
from vllm_ext.kernels.score_heads import Sizes
from vllm_ext.kernels.score_select import Plan

PLANS = {
    "one_head": Plan(heads=1, columns=16),
    "fused_2": Plan(heads=2, columns=32, programs=6),
    "two_launches": Plan(heads=2, columns=16, fused=False),
    "two_launches_8": Plan(heads=8, columns=64, programs=4, fused=False),
}
EIGHT = ([300, 17, 64, 1, 90], [1] * 5, 8, 4, 64, 16, "HND")
"""KV heads and groups of Llama-3.1-8B."""


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", [*SHAPES, "eight"])
def test_lists_equal_reference(name: str, plan: str) -> None:
    lens, queries, h, g, d, page, layout = SHAPES.get(name, EIGHT)
    p = make(lens, queries, h, g, d, page, layout=layout)
    fill_index(p, "minmax")
    ids, counts, buf = run_select(p, "bound", "max", capacity=5, plan=PLANS[plan])
    for r, n in enumerate(lens):
        if n == 0:
            assert (counts[r] == -7).all()
            continue
        expected = expected_list(p, r, "bound", "max", 5)
        assert (counts[r] == expected.shape[1]).all()
        assert torch.equal(ids[r, :, : expected.shape[1]].cpu(), expected.cpu())
        assert (ids[r, :, expected.shape[1] :] == -1).all()
    assert (buf.ticket == 0).all()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("score", "group"), [("bound", "mean"), ("dot", "max"), ("dot", "mean")])
def test_other_scores_and_groups(score: str, group: str, plan: str) -> None:
    p = make([300, 45], [2, 3], 4, 2, 64, 16, records=2 if score == "bound" else 1)
    fill_index(p, "minmax" if score == "bound" else "mean")
    ids, counts, _ = run_select(p, score, group, capacity=6, plan=PLANS[plan])
    for r in range(2):
        expected = expected_list(p, r, score, group, 6)
        assert torch.equal(ids[r, :, : expected.shape[1]].cpu(), expected.cpu())
        assert (counts[r] == expected.shape[1]).all()


@pytest.mark.parametrize(("score", "group"), [("exact", "max"), ("recency", "max"), ("bound", "softmax")])
def test_what_the_plan_does_not_serve_is_still_right(score: str, group: str) -> None:
    p = make([300, 45], [2, 3], 4, 2, 64, 16)
    fill_index(p, "minmax")
    ids, _, _ = run_select(p, score, group, capacity=6, plan=PLANS["two_launches"])
    for r in range(2):
        expected = expected_list(p, r, score, group, 6)
        assert torch.equal(ids[r, :, : expected.shape[1]].cpu(), expected.cpu())


@pytest.mark.parametrize("plan", PLANS)
def test_scores_are_those_of_the_default(plan: str) -> None:
    """Also where lists would hide a difference: tiles of several workers, and a buffer longer than the block table."""
    p = make([16 * 150 + 3, 16 * 70], [1, 2], 4, 2, 64, 16, dtype=torch.float16)
    fill_index(p, "minmax")
    found = []
    for one in (None, PLANS[plan]):
        for _ in range(2):  # again over the same scratch
            ids, counts, buf = run_select(p, "bound", "max", capacity=20, pages=256, radius=0.5, plan=one)
        found.append((ids.clone(), counts.clone(), buf.scores[0, :, 0, :151].clone(), buf.stats.clone()))
    for want, got in zip(*found):
        assert torch.allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_dense_requests_and_counters(plan: str) -> None:
    p = make([100, 60, 200], [1, 1, 1], 2, 2, 64, 16)
    fill_index(p, "minmax")
    _, counts, buf = run_select(p, "bound", "max", capacity=4, dense_limit=64, plan=PLANS[plan])
    assert counts.tolist() == [[4, 4], [-1, -1], [4, 4]]
    read = 2 * ((64 - (112 - 100)) + 60 + (64 - (208 - 200)))
    assert buf.stats.tolist() == [read, 2 * 360, 2 * (7 + 13), 2 * 8, 4, 2, 0, 0]


@pytest.mark.parametrize("plan", PLANS)
def test_completed_pages_get_their_record(plan: str) -> None:
    """Of sparse and of dense requests, with drafts, for every head."""
    p = make([64, 63, 50, 16], [1, 1, 3, 1], 4, 2, 64, 16)
    run_select(p, "bound", "max", capacity=4, dense_limit=20, plan=PLANS[plan])
    for r, page in ((0, 3), (2, 2), (3, 0)):
        done = p.block_table[r, page].item()
        assert torch.equal(p.index[done], reference.index_record(p.k_cache[done], "minmax"))
    assert p.index[p.block_table[1, 3].item()].isnan().all()


@pytest.mark.parametrize("plan", PLANS)
def test_ties_go_to_the_lower_page(plan: str) -> None:
    p = make([640], [1], 2, 2, 64, 16)
    p.index.zero_()
    ids, _, _ = run_select(p, "bound", "max", capacity=9, plan=PLANS[plan])
    assert ids[0].tolist() == [[0, 1, 2, 3, 4, 5, 6, 38, 39]] * 2


def test_garbage_behind_a_request_is_never_an_address() -> None:
    """The first tile's block table is read before the request's length: what lies behind must not be used."""
    p = make([40, 300], [1, 1], 2, 2, 64, 16)
    p.block_table[0, 3:] = 2**30
    fill_index(p, "minmax")
    ids, _, _ = run_select(p, "bound", "max", capacity=3, plan=PLANS["one_head"])
    assert torch.equal(ids[0].cpu(), expected_list(p, 0, "bound", "max", 3).cpu())


@pytest.mark.parametrize(
    ("heads", "rows", "want"),
    [
        (8, 4, (8, 4, 32, 8)), (3, 3, (1, 4, 16, 64)), (8, 16, (4, 16, 64, 16)), (8, 128, (1, 128, 128, 64)),
        (2, 1, (2, 1, 16, 32)),
    ],
)  # fmt: skip
def test_sizes_fit(heads: int, rows: int, want: tuple[int, ...]) -> None:
    sizes = Sizes.of(Plan(heads=8, columns=64), heads, rows)
    assert (sizes.heads, sizes.head_rows, sizes.rows, sizes.tile) == want
