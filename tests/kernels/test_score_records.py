"""The lists of index scores are the reference's, whatever tiles and programs a launch is made of."""

from __future__ import annotations

import pytest
import torch
from paged import fill_index, make
from test_kernels import SHAPES, expected_list, run_select

from vllm_ext.kernels import reference, score_records

EIGHT = ([300, 17, 64, 1, 90], [1] * 5, 8, 4, 64, 16, "HND")
"""KV heads and groups of Llama-3.1-8B."""


@pytest.fixture(params=["as tuned", "small tiles", "one program a head"])
def launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several workers a request and head, each with several tiles, or one worker for all."""
    if request.param != "as tuned":
        monkeypatch.setattr(score_records, "TILE", 16)
    if request.param == "one program a head":
        monkeypatch.setattr(score_records, "PROGRAMS", 1)


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize("name", [*SHAPES, "eight"])
def test_lists_equal_reference(name: str) -> None:
    lens, queries, h, g, d, page, layout = SHAPES.get(name, EIGHT)
    p = make(lens, queries, h, g, d, page, layout=layout)
    fill_index(p, "minmax")
    ids, counts, buf = run_select(p, "bound", "max", capacity=5)
    for r, n in enumerate(lens):
        if n == 0:
            assert (counts[r] == -7).all()
            continue
        expected = expected_list(p, r, "bound", "max", 5)
        assert (counts[r] == expected.shape[1]).all()
        assert torch.equal(ids[r, :, : expected.shape[1]].cpu(), expected.cpu())
        assert (ids[r, :, expected.shape[1] :] == -1).all()
    assert (buf.ticket == 0).all()


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize(("score", "group"), [("bound", "mean"), ("dot", "max"), ("dot", "mean")])
def test_other_scores_and_groups(score: str, group: str) -> None:
    p = make([300, 45], [2, 3], 4, 2, 64, 16, records=2 if score == "bound" else 1)
    fill_index(p, "minmax" if score == "bound" else "mean")
    ids, counts, _ = run_select(p, score, group, capacity=6)
    for r in range(2):
        expected = expected_list(p, r, score, group, 6)
        assert torch.equal(ids[r, :, : expected.shape[1]].cpu(), expected.cpu())
        assert (counts[r] == expected.shape[1]).all()


@pytest.mark.parametrize(("score", "group"), [("exact", "max"), ("recency", "max"), ("bound", "softmax")])
def test_other_scores_are_left_to_the_other_kernel(score: str, group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_records, "score_records", None)
    p = make([300, 45], [2, 3], 4, 2, 64, 16)
    fill_index(p, "minmax")
    ids, _, _ = run_select(p, score, group, capacity=6)
    for r in range(2):
        expected = expected_list(p, r, score, group, 6)
        assert torch.equal(ids[r, :, : expected.shape[1]].cpu(), expected.cpu())


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize("group", ["max", "mean"])
def test_scores_equal_reference(group: str) -> None:
    """Where lists would hide a difference: tiles of several workers, a buffer longer than the block table, and pages
    that the step completes, whose former record is no score (methods take a softmax over all of them)."""
    lens = [16 * 150 + 3, 16 * 70, 16 * 80]
    p = make(lens, [1, 2, 1], 4, 2, 64, 16)
    for _ in range(2):  # again over the same scratch
        fill_index(p, "minmax")
        p.index[p.block_table[2, 79]] = 1e4
        _, _, buf = run_select(p, "bound", group, capacity=20, pages=256, radius=0.5)
        for r, n in enumerate(lens):
            pages = p.block_table[r, : -(-n // p.page)].long()
            q = p.q[p.starts[r] : p.starts[r + 1]]
            want = reference.page_scores(q, p.k_cache, p.index, pages, n, p.scale, "bound", group, 0.5)
            assert torch.allclose(buf.scores[r, :, 0, : len(pages)], want, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("launch")
def test_dense_requests_and_counters() -> None:
    p = make([100, 60, 200], [1, 1, 1], 2, 2, 64, 16)
    fill_index(p, "minmax")
    _, counts, buf = run_select(p, "bound", "max", capacity=4, dense_limit=64)
    assert counts.tolist() == [[4, 4], [-1, -1], [4, 4]]
    read = 2 * ((64 - (112 - 100)) + 60 + (64 - (208 - 200)))
    assert buf.stats.tolist() == [read, 2 * 360, 2 * (7 + 13), 2 * 8, 4, 2, 0, 0]


@pytest.mark.usefixtures("launch")
def test_completed_pages_get_their_record() -> None:
    """Of sparse and of dense requests, with drafts, for every head."""
    p = make([64, 63, 50, 16], [1, 1, 3, 1], 4, 2, 64, 16)
    run_select(p, "bound", "max", capacity=4, dense_limit=20)
    for r, page in ((0, 3), (2, 2), (3, 0)):
        done = p.block_table[r, page].item()
        assert torch.equal(p.index[done], reference.index_record(p.k_cache[done], "minmax"))
    assert p.index[p.block_table[1, 3].item()].isnan().all()


@pytest.mark.usefixtures("launch")
def test_ties_go_to_the_lower_page() -> None:
    p = make([640], [1], 2, 2, 64, 16)
    p.index.zero_()
    ids, _, _ = run_select(p, "bound", "max", capacity=9)
    assert ids[0].tolist() == [[0, 1, 2, 3, 4, 5, 6, 38, 39]] * 2


@pytest.mark.usefixtures("launch")
def test_garbage_behind_a_request_is_never_an_address() -> None:
    """The first tile's block table is read before the request's length: what lies behind must not be used."""
    p = make([40, 300], [1, 1], 2, 2, 64, 16)
    p.block_table[0, 3:] = 2**30
    fill_index(p, "minmax")
    ids, _, _ = run_select(p, "bound", "max", capacity=3)
    assert torch.equal(ids[0].cpu(), expected_list(p, 0, "bound", "max", 3).cpu())
