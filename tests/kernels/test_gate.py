"""Kernels of the learned gate against their reference, and the reference against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from learned import ROPE, gates, random_gates
from paged import DEVICE, make

from vllm_ext.attention_backends.rope import ModelShape, inverse_frequencies
from vllm_ext.attention_backends.seer import Seer
from vllm_ext.attention_backends.stages import DecodeBatch, StageDims
from vllm_ext.kernels import gate, reference
from vllm_ext.kernels import reference_gate as spec


def frequencies(size: int, share: float = 1.0) -> torch.Tensor:
    return torch.tensor(inverse_frequencies(ROPE | {"share": share}, size), device=DEVICE)


def test_rotation_is_undone() -> None:
    x = torch.randn(5, 3, 20, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    cos, sin = spec.rope_tables(frequencies(16).cpu(), torch.arange(5) * 1000)
    back = spec.unrotate(spec.rotate(x, cos[:, None], sin[:, None]), cos[:, None], sin[:, None])
    torch.testing.assert_close(back, x, atol=2e-6, rtol=1e-5)


def test_rotation_is_that_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, rope_parameters={"rope_type": "default", **{"rope_theta": 1e4}}
    )
    x = torch.randn(1, 2, 7, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(100, 107)
    want, _ = apply_rotary_pos_emb(x, x, *LlamaRotaryEmbedding(config)(x, positions[None]))
    found = spec.rotate(x, *spec.rope_tables(frequencies(32).cpu(), positions))
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_record_by_definition() -> None:
    """One head, worked out from keys that were never rotated."""
    page, d, width, first = 4, 8, 16, 12
    gen = torch.Generator().manual_seed(0)
    plain = torch.randn(1, page, d, generator=gen)
    wk, norm = torch.randn(1, 3 * d, width, generator=gen), torch.rand(width, generator=gen)
    cos, sin = spec.rope_tables(frequencies(d).cpu(), torch.arange(first, first + page))
    found = spec.page_record(
        spec.rotate(plain, cos, sin), first, wk, norm, frequencies(d).cpu(), frequencies(width).cpu()
    )
    pooled = torch.cat([plain[0].max(0).values, plain[0].min(0).values, plain[0].mean(0)])
    k = pooled @ wk[0]
    k = k / (k.pow(2).mean() + 1e-6).sqrt() * norm
    for c in range(width // 2):
        angle = first * 10000 ** (-2 * c / width)
        a, b = k[c].item(), k[c + width // 2].item()
        assert found[0, c].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-4)
        assert found[0, c + width // 2].item() == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-4)


@pytest.mark.parametrize(
    ("heads", "g", "d", "width", "page", "share"),
    [(2, 3, 64, 64, 16, 1.0), (1, 4, 128, 128, 64, 1.0), (1, 1, 80, 64, 32, 1.0), (2, 2, 64, 128, 16, 0.5)],
)
def test_kernels_equal_the_reference(heads: int, g: int, d: int, width: int, page: int, share: float) -> None:
    lens, queries = [3 * page, 5 * page + 3, 0, 2 * page + 1], [1, 4, 0, 2]
    p = make(lens, queries, heads, g, d, page, records=-(-width // d))
    layer = {k: v.to(DEVICE) for k, v in random_gates(ModelShape(1, heads * g, heads, d, ROPE), width)[0].items()}
    wq, wk = layer["q"].flatten(1, 2), layer["k"]
    freq, gate_freq = frequencies(d, share), frequencies(width, share)
    order = gate.paired(width, 2 * gate_freq.numel()).to(DEVICE)
    out = torch.full((sum(queries), heads, width), float("nan"), device=DEVICE)
    tables = gate.table(freq, 8 * page, freq.numel()), gate.table(gate_freq, 8 * page, width // 2)
    sorted_layer = [x[..., order].contiguous() for x in (wq, wk, layer["q_norm"], layer["k_norm"])]
    gate.gate_step(
        p.q, p.k_cache, p.index, *sorted_layer, out, *tables, p.seq_lens, p.query_start_loc, p.slot_mapping,
        max_query_len=4,
    )  # fmt: skip
    written = 0
    for r, n in enumerate(lens):
        rows = slice(p.starts[r], p.starts[r + 1])
        if n:
            want = spec.queries(p.q[rows], n, wq, layer["q_norm"], freq, gate_freq)
            torch.testing.assert_close(out[rows], want[..., order], atol=2e-4, rtol=1e-4)
        for number in range((n - queries[r]) // page, n // page):
            at = p.block_table[r, number].item()
            want = spec.page_record(p.k_cache[at], number * page, wk, layer["k_norm"], freq, gate_freq)
            torch.testing.assert_close(p.index[at].flatten(1)[:, :width], want[:, order], atol=2e-4, rtol=1e-4)
            written += 1
    assert written == 3
    untouched = p.index[p.block_table[1, 0].item()]
    assert untouched.isnan().all()


def test_prompt_chunks_write_every_record() -> None:
    """Chunks of several prompts, one of which begins inside a page."""
    heads, d, page = 2, 64, 16
    lens, chunk = [70, 37, 16], [70, 20, 5]
    p = make(lens, chunk, heads, 2, d, page, records=1)
    layer = random_gates(ModelShape(1, 2 * heads, heads, d, ROPE), d)[0]
    layer = {k: v.to(DEVICE) for k, v in layer.items()}
    freq = frequencies(d)
    tables = [gate.table(freq, 128, d // 2)] * 2
    gate.gate_step(
        None, p.k_cache, p.index, layer["q"].flatten(1, 2), layer["k"], layer["q_norm"], layer["k_norm"], None, *tables,
        p.seq_lens, p.query_start_loc, p.slot_mapping, max_query_len=70,
    )  # fmt: skip
    done = {(r, i) for r, n in enumerate(lens) for i in range((n - chunk[r]) // page, n // page)}
    assert len(done) == 4 + 1 + 1
    for r, n in enumerate(lens):
        for i in range(-(-n // page)):
            at = p.block_table[r, i].item()
            if (r, i) not in done:
                assert p.index[at].isnan().all()
                continue
            want = spec.page_record(p.k_cache[at], i * page, layer["k"], layer["k_norm"], freq, freq)
            torch.testing.assert_close(p.index[at, :, 0], want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.2])
def test_threshold_drops_what_the_reference_drops(threshold: float) -> None:
    heads, page, sizes = 2, 16, [12, 5, 9]
    lens = [s * page - 3 for s in sizes]
    p = make(lens, [1, 2, 1], heads, 2, 64, page)
    scores = torch.randn(3, heads, 1, 16, generator=torch.Generator().manual_seed(1)) * 2
    ids, pages = (torch.full((3, heads, 8), -1, dtype=torch.int32) for _ in range(2))
    counts = torch.full((3, heads), -1, dtype=torch.int32)
    want: dict[int, list[torch.Tensor]] = {}
    for r in (0, 2):  # the second request is dense
        s = scores[r, :, 0, : sizes[r]].clone()
        s[:, lens[r] // page :] = -math.inf
        chosen = reference.select_pages(s, lens[r], 1, page, 8, 1, 1)
        ids[r, :, : chosen.shape[1]], counts[r] = chosen, chosen.shape[1]
        pages[r] = p.block_table[r].cpu()[ids[r].clamp(min=0).long()]
        want[r] = spec.above_threshold(s, chosen, threshold, *reference.forced_pages(lens[r], 1, page, 1, 1))
    before = counts.clone()
    stats = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    moved = [x.to(DEVICE) for x in (scores, ids, pages, counts)]
    gate.drop_below(
        *moved, stats, p.seq_lens, p.query_start_loc, p.slot_mapping, page=page, threshold=threshold, sink=1, local=1
    )
    ids, pages, counts = (x.cpu() for x in moved[1:])
    for r, lists in want.items():
        for h, kept in enumerate(lists):
            assert counts[r, h] == kept.numel()
            assert torch.equal(ids[r, h, : kept.numel()], kept.to(torch.int32))
            assert torch.equal(pages[r, h, : kept.numel()], p.block_table[r].cpu()[kept.long()])
            assert (ids[r, h, kept.numel() :] == -1).all()
    assert (counts[1] == -1).all()
    dropped = int((before - counts)[[0, 2]].sum())
    assert stats.tolist() == [-dropped * page, 0, 0, -dropped, 0, 0, 0, 0]
    assert (dropped > 0) == (threshold > 0)


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_step_equals_the_reference_step(threshold: float) -> None:
    heads, g, d, page = 2, 3, 64, 16
    lens, queries = [150, 90, 47], [1, 1, 1]
    p = make(lens, queries, heads, g, d, page, records=1)
    file = gates(1, heads, g, d, d, page)
    method = Seer(budget=64, page_size=page, dense_below=60, gates=file, threshold=threshold)
    dims = StageDims(heads * g, heads, d, 4, 256, 1, DEVICE, torch.float32, (0,))
    stages, want = method.stages(dims), method.stages(dims)
    p.index.zero_()
    stages.allocate()
    flags = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    tokens = [n - 1 for n in lens]
    prompt = make(tokens, tokens, heads, g, d, page, records=1)
    at = [torch.arange(n, device=DEVICE) for n in tokens]
    slots = torch.cat([p.block_table[r, x // page].long() * page + x % page for r, x in enumerate(at)])
    prompt_batch = DecodeBatch(
        p.block_table, prompt.seq_lens, prompt.query_start_loc, slots, torch.ones_like(flags), sum(tokens), max(tokens)
    )
    stages.write_index(0, prompt.q, p.k_cache, p.v_cache, p.index, prompt_batch, p.scale)
    by_kernel = p.index.clone()
    p.index.zero_()
    want.reference_index(0, prompt.q, p.k_cache, p.v_cache, p.index, prompt_batch, p.scale)
    torch.testing.assert_close(by_kernel, p.index, atol=1e-4, rtol=1e-4)
    batch = DecodeBatch(p.block_table, p.seq_lens, p.query_start_loc, p.slot_mapping, flags, 3, 1)
    out, expected = torch.zeros_like(p.q), torch.zeros_like(p.q)
    stages.decode(0, p.q, p.k_cache, p.v_cache, p.index, batch, out, p.scale)
    want.reference_decode(0, p.q, p.k_cache, p.v_cache, p.index, batch, expected, p.scale)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(stages.stats, want.stats)
