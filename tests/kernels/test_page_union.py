"""Lists of single tokens and their union: the launches of RetroAttention against the references."""

from __future__ import annotations

import pytest
import torch
from paged import DEVICE, Paged, fill_index, make

from vllm_ext.attention_backends.retro import Retro
from vllm_ext.attention_backends.stages import DecodeBatch, StageDims, Stages
from vllm_ext.attention_backends.union_stages import UnionStages
from vllm_ext.kernels import reference
from vllm_ext.kernels.page_union import reference_union

SHAPES = {  # lens, queries, KV heads, group, head size, page
    "drafts": ([700, 97, 530], [4, 4, 4], 2, 3, 64, 16),
    "mixed_lengths": ([415, 333, 64], [1, 8, 3], 1, 4, 64, 16),
    "page_ends": ([273, 130, 128], [4, 3, 1], 2, 2, 80, 16),
    "padded_request": ([300, 0, 90], [2, 0, 3], 1, 2, 64, 16),
}


def stages_of(p: Paged, name: str, dense_below: int = 0) -> tuple[UnionStages, DecodeBatch]:
    lens, queries, heads, g, d, page = SHAPES[name]
    method = Retro(budget=7 * page, page_size=page, dense_below=dense_below)
    dims = StageDims(heads * g, heads, d, len(lens), 1024, max(queries), DEVICE, torch.float32)
    stages = method.stages(dims)
    stages.allocate()
    assert isinstance(stages, UnionStages)
    batch = DecodeBatch(
        p.block_table, p.seq_lens, p.query_start_loc, p.slot_mapping, torch.zeros_like(p.seq_lens), len(p.slot_mapping),
        max(queries),
    )  # fmt: skip
    return stages, batch


@pytest.mark.parametrize("name", SHAPES)
def test_step_equals_reference(name: str) -> None:
    p = make(*SHAPES[name])
    fill_index(p, "minmax")
    stages, batch = stages_of(p, name)
    out, want = torch.full_like(p.q, float("nan")), torch.full_like(p.q, float("nan"))
    stages.decode(0, p.q, p.k_cache, p.v_cache, p.index, batch, out, p.scale)
    lists = stages.union.ids.clone()
    counted = stages.stats.clone()
    stages.stats.zero_()
    stages.reference_decode(0, p.q, p.k_cache, p.v_cache, p.index, batch, want, p.scale)
    assert torch.allclose(out, want, atol=2e-5)
    assert torch.equal(stages.stats, counted)
    for row in stages.rows(batch, p.page):
        ids, _ = stages.reference_select(0, row, p.q[row.tokens], p.k_cache, p.index, p.scale)
        assert torch.equal(lists[row.number, :, : ids.shape[1]], ids)
        assert (lists[row.number, :, ids.shape[1] :] == -1).all()


def test_one_token_is_quest() -> None:
    name = "page_ends"
    p = make(*SHAPES[name])
    fill_index(p, "minmax")
    stages, batch = stages_of(p, name)
    row = list(stages.rows(batch, p.page))[2]
    assert row.m == 1
    arguments = (0, row, p.q[row.tokens], p.k_cache, p.index, p.scale)
    assert torch.equal(stages.reference_select(*arguments)[0], Stages.reference_select(stages, *arguments)[0])


def test_union_is_own_list_merged_with_the_supplement() -> None:
    """The paper's correction: partial results of disjoint page sets, merged by their log-sum-exp."""
    p = make([700], [4], 1, 3, 64, 16)
    fill_index(p, "minmax")
    name = "drafts"
    stages, batch = stages_of(p, name)
    [row] = stages.rows(batch, p.page)
    ids, read = stages.reference_select(0, row, p.q, p.k_cache, p.index, p.scale)
    whole = stages.reference_attend(0, row, p.q, p.k_cache, p.v_cache, ids, read, p.scale)
    t = 1  # its pages and those that only other tokens chose
    n = row.n - row.m + 1 + t
    s = reference.page_scores(p.q[t : t + 1], p.k_cache, p.index, row.pages, n, p.scale, "bound", "max")
    own = reference.select_pages(s, n, 1, p.page, 7, 1, 2)
    rest = torch.tensor(
        [[i for i in ids[0].tolist() if i not in own[0].tolist()]], dtype=torch.int32, device=ids.device
    )
    assert rest.numel()
    parts = [
        reference.sparse_attention(p.q[t : t + 1], p.k_cache, p.v_cache, row.pages, part, n, p.scale)
        for part in (own, rest)
    ]
    merged, _ = reference.merge(*(torch.stack(x) for x in zip(*parts)))
    assert torch.allclose(merged[0], whole[t], atol=1e-5)


def test_dense_requests_are_dense_in_all_tokens() -> None:
    """A request at the limit: no token of it is sparse, though the last one alone sees more keys than the first."""
    p = make([130, 700], [4, 4], 2, 3, 64, 16)
    fill_index(p, "minmax")
    stages, batch = stages_of(p, "drafts", dense_below=130)
    out = torch.empty_like(p.q)
    stages.decode(0, p.q, p.k_cache, p.v_cache, p.index, batch, out, p.scale)
    assert stages.union.counts[0].tolist() == [-1, -1]
    assert (stages.union.counts[1] > 0).all()
    want, _ = reference.sparse_attention(p.q[:4], p.k_cache, p.v_cache, p.block_table[0, :9].long(), None, 130, p.scale)
    assert torch.allclose(out[:4], want, atol=2e-5)
    assert stages.stats[5] == 2


def test_reference_union() -> None:
    lists = [torch.tensor([[0, 2, 5], [0, 1, 5]]), torch.tensor([[0, 3, 5], [0, 1, 5]])]
    assert reference_union(lists).tolist() == [[0, 2, 3, 5], [0, 1, 5, -1]]
