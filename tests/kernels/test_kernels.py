"""Every Triton kernel against its plain-PyTorch reference, at odd named shapes (interpreter without a GPU)."""

from __future__ import annotations

import pytest
import torch
from paged import DEVICE, Paged, fill_index, make

from vllm_ext.kernels import reference
from vllm_ext.kernels.index_update import update_index
from vllm_ext.kernels.merge import merge
from vllm_ext.kernels.score_select import SelectBuffers, score_select
from vllm_ext.kernels.sparse_decode import DecodeBuffers, sparse_decode

# name: lens, queries, KV heads, group, head size, page, layout
SHAPES = {
    "one_token": ([300, 17, 64, 1], [1, 1, 1, 1], 2, 4, 64, 16, "HND"),
    "odd_group_3": ([130, 256], [1, 1], 3, 3, 64, 32, "NHD"),
    "odd_group_7": ([200, 190], [1, 1], 1, 7, 128, 64, "HND"),
    "drafts": ([130, 129, 70], [4, 2, 3], 2, 2, 64, 16, "HND"),
    "group_16_eight_tokens": ([150], [8], 1, 16, 64, 32, "HND"),
    "head_80": ([140, 33], [1, 1], 2, 1, 80, 16, "NHD"),
    "head_96": ([140, 33], [2, 2], 2, 2, 96, 32, "HND"),
    "head_256": ([129], [1], 1, 2, 256, 128, "HND"),
    "padded_request": ([90, 0, 100], [1, 0, 1], 2, 2, 64, 16, "HND"),
}
# Triton's interpreter multiplies bfloat16 operands as raw integers, so bfloat16 needs a GPU.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
KW = {"sink": 1, "local": 2}


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error of an output (norm over norm)."""
    return {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]


def error(out: torch.Tensor, ref: torch.Tensor) -> float:
    return ((out.float() - ref.float()).norm() / ref.float().norm()).item()


def expected_list(p: Paged, r: int, score: str, group: str, capacity: int, radius: float = 1.0) -> torch.Tensor:
    n, rows = p.lens[r], slice(p.starts[r], p.starts[r + 1])
    pages = p.block_table[r, : -(-n // p.page)].long()
    s = reference.page_scores(p.q[rows], p.k_cache, p.index, pages, n, p.scale, score, group, radius)
    return reference.select_pages(s, n, rows.stop - rows.start, p.page, capacity, **KW)


def run_select(
    p: Paged, score: str, group: str, capacity: int, dense_limit: int = 0, pages: int = 0, radius: float = 1.0
):
    m = max(b - a for a, b in zip(p.starts, p.starts[1:]))
    heads = p.k_cache.shape[1]
    rows = m * p.q.shape[1] // heads
    buf = SelectBuffers.allocate(len(p.lens), heads, rows, pages or p.block_table.shape[1], capacity, group, DEVICE)
    buf.ids.fill_(-7)
    buf.counts.fill_(-7)
    ids, pages, counts = score_select(
        p.q, p.k_cache, p.index, p.block_table, p.seq_lens, p.query_start_loc,
        torch.zeros(len(p.lens), dtype=torch.int32, device=DEVICE), p.slot_mapping, buf,
        max_query_len=m, scale=p.scale, dense_limit=dense_limit, capacity=capacity, score=score, group=group,
        index_kind="minmax" if p.index.shape[2] == 2 else "mean", radius=radius, **KW,
    )  # fmt: skip
    for r in range(len(p.lens)):
        for h in range(heads):
            c = int(counts[r, h])
            if c > 0:
                assert torch.equal(pages[r, h, :c], p.block_table[r][ids[r, h, :c].long()])
    return ids, counts, buf


@pytest.mark.parametrize("kind", ["minmax", "mean"])
@pytest.mark.parametrize("name", ["one_token", "odd_group_3", "head_80", "head_256"])
def test_index_of_completed_pages(name: str, kind: str) -> None:
    lens, queries, h, g, d, page, layout = SHAPES[name]
    p = make(lens, queries, h, g, d, page, layout=layout, records=2 if kind == "minmax" else 1)
    slots = torch.cat([torch.arange(page * 2 + page - 1), torch.full((3,), -1)]).to(DEVICE)  # pages 0, 1; 2 incomplete
    update_index(p.k_cache, p.index, slots, kind)
    for full in (0, 1):
        expected = reference.index_record(p.k_cache[full], kind)
        assert torch.allclose(p.index[full].float(), expected.float(), atol=1e-6)
    assert p.index[2:].isnan().all()


@pytest.mark.parametrize("rows", [1, 16, None])
@pytest.mark.parametrize("kind", ["minmax", "mean"])
@pytest.mark.parametrize("seed", range(3))
def test_index_of_prompt_chunks(rows: int | None, kind: str, seed: int) -> None:
    """Chunks of several requests that start and end inside pages, rows without a slot; nothing else is written."""
    p = make(
        [16 * 6 + 5, 37, 16, 15, 31, 100], [70, 30, 1, 9, 2, 85], 2, 2, 64, 16, records=2 - (kind == "mean"), seed=seed
    )
    gen = torch.Generator().manual_seed(seed)
    slots = p.slot_mapping.clone()
    slots[torch.randint(0, slots.numel(), (9,), generator=gen).to(DEVICE)] = -1
    slots = torch.cat([torch.full((seed,), -1, device=DEVICE), slots])[seed:]  # a view that is not aligned
    want = p.index.clone()
    reference.update_index(p.k_cache, want, slots, kind)
    update_index(p.k_cache, p.index, slots, kind, rows)
    assert torch.allclose(p.index, want, atol=1e-6, equal_nan=True)
    assert 5 < (~p.index.isnan().flatten(1).any(1)).sum() < p.index.shape[0] - 4


def test_index_of_many_pages_in_neighbouring_rows() -> None:
    """A program whose every token completes a page (decode rows)."""
    p = make([16] * 40, [1] * 40, 1, 1, 64, 16)
    update_index(p.k_cache, p.index, p.slot_mapping, "minmax", 64)
    pages = p.block_table[:, 0].long()
    assert torch.equal(p.index[pages], reference.index_record(p.k_cache[pages], "minmax"))


@pytest.mark.parametrize("group", ["max", "mean", "softmax"])
@pytest.mark.parametrize("name", SHAPES)
def test_quest_lists_equal_reference(name: str, group: str) -> None:
    lens, queries, h, g, d, page, layout = SHAPES[name]
    p = make(lens, queries, h, g, d, page, layout=layout)
    fill_index(p, "minmax")
    ids, counts, buf = run_select(p, "bound", group, capacity=5)
    for r, n in enumerate(lens):
        if n == 0:
            assert (counts[r] == -7).all()
            continue
        expected = expected_list(p, r, "bound", group, 5)
        assert (counts[r] == expected.shape[1]).all()
        assert torch.equal(ids[r, :, : expected.shape[1]].cpu(), expected.cpu())
        assert (ids[r, :, expected.shape[1] :] == -1).all()
    assert (buf.ticket == 0).all()


@pytest.mark.parametrize("score", ["exact", "recency", "dot"])
@pytest.mark.parametrize("name", ["one_token", "drafts", "head_96"])
def test_other_scores_equal_reference(name: str, score: str) -> None:
    lens, queries, h, g, d, page, layout = SHAPES[name]
    p = make(lens, queries, h, g, d, page, layout=layout)
    fill_index(p, "minmax")
    group = "softmax" if score == "exact" else "max"
    ids, counts, _ = run_select(p, score, group, capacity=4)
    for r in range(len(lens)):
        expected = expected_list(p, r, score, group, 4)
        assert torch.equal(ids[r, :, : expected.shape[1]].cpu(), expected.cpu())
        assert (counts[r] == expected.shape[1]).all()


@pytest.mark.parametrize("radius", [0.0, 0.5])
def test_smaller_radius_equals_reference(radius: float) -> None:
    p = make([700, 333], [1, 2], 2, 3, 64, 16)
    fill_index(p, "minmax")
    ids, _, _ = run_select(p, "bound", "max", capacity=9, radius=radius)
    for r in range(2):
        assert torch.equal(ids[r].cpu(), expected_list(p, r, "bound", "max", 9, radius).cpu())


def test_bound_is_above_every_logit_of_its_page_and_its_centre_is_not() -> None:
    """Identity of Quest, section 3.2; `radius` 0 is the centre of the box alone."""
    p = make([640], [1], 2, 2, 64, 16)
    fill_index(p, "minmax")
    pages = p.block_table[0, :40].long()
    keys = p.k_cache[pages].transpose(0, 1).float()
    rows = reference.grouped(p.q, 2)
    logits = torch.einsum("hrd,hnpd->hrnp", rows, keys).mul(p.scale).amax(-1).amax(1)
    bound, centre = (
        reference.page_scores(p.q, p.k_cache, p.index, pages, 641, p.scale, "bound", "max", radius) for radius in (1, 0)
    )
    assert (bound >= logits - 1e-4).all()
    assert (centre < logits).any()


@pytest.mark.parametrize("score", ["bound", "exact"])  # a launch of its own each
def test_ties_go_to_the_lower_page(score: str) -> None:
    p = make([640], [1], 1, 2, 64, 16)
    p.index.zero_()
    p.k_cache.zero_()
    ids, counts, _ = run_select(p, score, "max", capacity=9)
    assert counts.item() == 9
    assert ids[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 38, 39]


@pytest.mark.parametrize("score", ["bound", "exact"])
def test_many_tiles_and_reuse_of_the_buffers(score: str) -> None:
    """More than one tile a request, and a second step over the same scratch."""
    p = make([16 * 150 + 3, 16 * 70], [1, 1], 1, 2, 64, 16)
    fill_index(p, "minmax")
    for _ in range(2):
        ids, _, buf = run_select(p, score, "max", capacity=20, pages=256)
        for r in range(2):
            assert torch.equal(ids[r].cpu(), expected_list(p, r, score, "max", 20).cpu())
        assert (buf.ticket == 0).all()


def test_dense_requests_and_counters() -> None:
    p = make([100, 60, 200], [1, 1, 1], 2, 2, 64, 16)
    _, counts, buf = run_select(p, "exact", "max", capacity=4, dense_limit=64)
    assert counts.tolist() == [[4, 4], [-1, -1], [4, 4]]
    read = 2 * ((64 - (112 - 100)) + 60 + (64 - (208 - 200)))
    assert buf.stats.tolist() == [read, 2 * 360, 2 * (7 + 13), 2 * 8, 4, 2, 0, 0]


@pytest.mark.parametrize("group", ["max", "softmax"])
def test_score_select_completes_the_index(group: str) -> None:
    """A decode step that fills a page leaves that page's record behind."""
    p = make([64, 63, 50], [1, 1, 3], 2, 2, 64, 16)
    run_select(p, "bound", group, capacity=4)
    done = p.block_table[0, 3].item()
    assert torch.equal(p.index[done], reference.index_record(p.k_cache[done], "minmax"))
    drafted = p.block_table[2, 2].item()  # tokens 47, 48, 49: page 2 is complete with token 47
    assert torch.equal(p.index[drafted], reference.index_record(p.k_cache[drafted], "minmax"))
    assert p.index[p.block_table[1, 3].item()].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_sparse_decode_equals_reference(name: str, dtype: torch.dtype) -> None:
    lens, queries, h, g, d, page, layout = SHAPES[name]
    if DEVICE == "cuda" and dtype == torch.float32:  # no engine runs it there: 128 x 256 in fp32 exceeds shared memory
        page = min(page, 64)
    p = make(lens, queries, h, g, d, page, dtype=dtype, layout=layout)
    fill_index(p, "minmax")
    for capacity, limit in ((5, 0), (5, 10**6)):  # lists; every request dense
        ids, counts, _ = run_select(p, "bound", "max", capacity, dense_limit=limit)
        check_decode(p, ids, counts, dtype)


def physical(p: Paged, ids: torch.Tensor) -> torch.Tensor:
    """Physical pages of logical lists."""
    return torch.stack([p.block_table[r][ids[r].clamp(min=0).long()] for r in range(len(p.lens))])


def check_decode(p: Paged, ids: torch.Tensor, counts: torch.Tensor, dtype: torch.dtype, **extra) -> None:
    m = max(b - a for a, b in zip(p.starts, p.starts[1:]))
    h = p.k_cache.shape[1]
    for splits in (1, 4):
        out = torch.full_like(p.q, float("nan"))
        lse = torch.full(p.q.shape[:2], float("nan"), device=DEVICE)
        buf = DecodeBuffers.allocate(len(p.lens), h, m * p.q.shape[1] // h, p.q.shape[2], DEVICE)
        sparse_decode(
            p.q, p.k_cache, p.v_cache, p.block_table, p.seq_lens, p.query_start_loc, physical(p, ids), counts, out, buf,
            max_query_len=m, scale=p.scale, lse=lse, splits=splits, **extra,
        )  # fmt: skip
        assert (buf.ticket == 0).all()
        for r, n in enumerate(p.lens):
            rows = slice(p.starts[r], p.starts[r + 1])
            if n == 0:
                continue
            count = int(counts[r, 0])
            chosen = None if count < 0 else ids[r, :, :count]
            own = {k: v[r, :, :count] for k, v in extra.items()} if count >= 0 else {}
            pages = p.block_table[r, : -(-n // p.page)].long()
            ref, ref_lse = reference.sparse_attention(p.q[rows], p.k_cache, p.v_cache, pages, chosen, n, p.scale, **own)
            assert error(out[rows], ref) < tolerance(dtype)
            assert torch.allclose(lse[rows], ref_lse, atol=2e-3, rtol=1e-3)


def test_log_weights_and_row_masks() -> None:
    p = make([130, 140], [2, 2], 2, 2, 64, 16)
    fill_index(p, "minmax")
    ids, counts, _ = run_select(p, "bound", "max", capacity=5)
    gen = torch.Generator().manual_seed(1)
    weight = torch.rand(ids.shape, generator=gen).to(DEVICE)
    mask = torch.randint(1, 4, ids.shape, generator=gen, dtype=torch.int32).to(DEVICE)
    mask[..., 0] = 3  # every token reads something
    check_decode(p, ids, counts, torch.float32, log_weight=weight)
    check_decode(p, ids, counts, torch.float32, row_mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_capacity_of_all_pages_is_dense(dtype: torch.dtype) -> None:
    """Identity: a list that holds every page gives dense attention."""
    p = make([100, 37], [1, 1], 2, 2, 64, 16, dtype=dtype)
    fill_index(p, "minmax")
    ids, counts, _ = run_select(p, "bound", "max", capacity=8)
    assert counts[:, 0].tolist() == [7, 3]
    for r, n in enumerate(p.lens):
        pages = p.block_table[r, : -(-n // 16)].long()
        one = p.q[r : r + 1]
        a, _ = reference.sparse_attention(one, p.k_cache, p.v_cache, pages, ids[r, :, : counts[r, 0]], n, p.scale)
        b, _ = reference.sparse_attention(one, p.k_cache, p.v_cache, pages, None, n, p.scale)
        assert torch.equal(a, b)
    check_decode(p, ids, counts, dtype)
    listed, dense = torch.zeros_like(p.q), torch.zeros_like(p.q)
    buf = DecodeBuffers.allocate(2, 2, 2, 64, DEVICE)
    for out, held in ((listed, counts), (dense, torch.full_like(counts, -1))):
        sparse_decode(
            p.q, p.k_cache, p.v_cache, p.block_table, p.seq_lens, p.query_start_loc, physical(p, ids), held, out, buf,
            max_query_len=1, scale=p.scale, splits=4,
        )  # fmt: skip
    assert error(listed, dense) < 2e-3


@pytest.mark.parametrize("seed", range(5))
def test_random_partitions_merge_to_dense(seed: int) -> None:
    """Partials over a random partition of the pages, some empty, merge to the dense result (reference and kernel)."""
    p = make([16 * 9 + 5], [2], 2, 3, 64, 16, seed=seed)
    pages, n = p.block_table[0, :10].long(), p.lens[0]
    gen = torch.Generator().manual_seed(seed)
    owner = torch.randint(0, 4, (10,), generator=gen)
    outs, lses = [], []
    for s in range(5):  # part 4 is always empty
        ids = torch.nonzero(owner == s).flatten().to(torch.int32).expand(2, -1).to(DEVICE)
        if ids.shape[1] == 0:
            o, lse = torch.zeros_like(p.q), torch.full(p.q.shape[:2], -torch.inf, device=DEVICE)
        else:
            o, lse = reference.sparse_attention(p.q, p.k_cache, p.v_cache, pages, ids, n, p.scale)
        outs.append(o)
        lses.append(lse)
    dense, dense_lse = reference.sparse_attention(p.q, p.k_cache, p.v_cache, pages, None, n, p.scale)
    for fn in (reference.merge, merge):
        out, lse = fn(torch.stack(outs), torch.stack(lses))
        assert error(out, dense) < 1e-5
        assert torch.allclose(lse, dense_lse, atol=1e-5)


def test_merge_of_extreme_and_empty_partials() -> None:
    outs = torch.randn(3, 1, 1, 64, device=DEVICE)
    lses = torch.tensor([-1e4, -torch.inf, -1e4], device=DEVICE).view(3, 1, 1)
    for fn in (reference.merge, merge):
        out, lse = fn(outs, lses)
        assert torch.allclose(out.float(), (outs[0] + outs[2]) / 2, atol=1e-6)
        assert torch.allclose(lse, torch.full_like(lse, -1e4 + 0.6931472), rtol=1e-6)
    out, lse = merge(outs, torch.full_like(lses, -torch.inf))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
