"""ThinKV's thoughts, schedule and medoids."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ext.kernels import kv_reference as reference
from vllm_ext.kernels import kv_score_think as think
from vllm_ext.kv_managers import think_thresholds
from vllm_ext.kv_managers.fingerprint import fingerprint
from vllm_ext.kv_managers.think_kv import ThinkKV
from vllm_ext.kv_managers.think_thresholds import Thoughts
from vllm_ext.kv_managers.view import KVView
from vllm_ext.options import ConfigError

R, E, T = think.REASONING, think.EXECUTION, think.TRANSITION


def test_reasoning_without_a_budget_never_evicts():
    held = [128] * 20
    assert think.shrink(held, [R] * 20, None) == held


def test_a_schedule_of_whole_segments_is_full_kv():
    held = [128, 128, 128]
    assert think.shrink(held, [T, E, T], 100, schedule=(128,)) == held


def test_a_transition_shrinks_every_earlier_segment_by_one_step():
    assert think.shrink([128, 64, 8, 4, 128], [R, E, R, T, T], None) == [64, 32, 4, 4, 128]


def test_over_budget_the_oldest_of_the_least_important_shrinks_first():
    assert think.shrink([128] * 4, [R, E, E, R], 448) == [128, 64, 128, 128]
    assert think.shrink([128] * 4, [R, E, E, R], 300) == [128, 4, 32, 128]
    assert think.shrink([128] * 4, [R, E, T, E], 400) == [128, 128, 16, 128]
    assert think.shrink([128] * 3, [R, R, R], 1) == [4, 4, 4]


@given(st.lists(st.tuples(st.integers(1, 128), st.integers(0, 2)), min_size=1, max_size=12), st.data())
@settings(max_examples=150, deadline=None)
def test_counts_come_out_exactly_at_the_budget(segments, data):
    held, types = [s for s, _ in segments], [t for _, t in segments]
    least = [data.draw(st.integers(0, min(h, 8))) for h in held]
    budget = data.draw(st.integers(sum(least), sum(held)))
    kept = think.fit(think.shrink(held, types, budget), held, budget, least)
    assert sum(kept) == budget
    assert all(m <= k <= h for m, k, h in zip(least, kept, held))


def test_sparsity_by_hand():
    rows = torch.tensor([[0.9, 0.05, 0.05, 0.0], [0.25, 0.25, 0.25, 0.25]])
    found = think.sparsity(rows[None, None], torch.tensor([3, 4]))
    assert found.tolist() == [0.0]
    rows[0] = torch.tensor([0.99, 0.005, 0.005, 0.0])
    assert think.sparsity(rows[None, None], torch.tensor([3, 4])).item() == pytest.approx((2 / 3) / 2)
    assert [think.thought(x, 0.5, 0.8) for x in (0.4, 0.5, 0.79, 0.8)] == [E, R, R, T]


def test_one_medoid_of_each_well_separated_cluster_stays():
    gen = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(5, 16, generator=gen)
    member = torch.arange(40) % 5
    keys = (centres[member] + 0.1 * torch.randn(40, 16, generator=gen))[None]
    start = torch.linspace(0, 39, 5).round().long()
    assert len(set(member[start].tolist())) < 5  # the start covers fewer clusters than there are
    keys = keys[:, member.argsort(stable=True)]
    rank = think.medoid_rank(keys, torch.zeros(1, 40, dtype=torch.bool), 5)
    assert sorted((rank.topk(5).indices[0] // 8).tolist()) == [0, 1, 2, 3, 4]
    forced = torch.zeros(1, 40, dtype=torch.bool)
    forced[0, [7, 31]] = True
    assert {7, 31} <= set(think.medoid_rank(keys, forced, 5).topk(5).indices[0].tolist())


def test_a_medoid_is_the_member_nearest_to_its_centre():
    keys = torch.tensor([[[0.0], [1.0], [2.1], [10.0], [11.0], [12.1]]])
    rank = think.medoid_rank(keys, torch.zeros(1, 6, dtype=torch.bool), 2)
    assert sorted(rank.topk(2).indices[0].tolist()) == [1, 4]


def replay(method, steps, prompt=0, heads=2, layers=2, d=8):
    """Positions [L, H, kept] after `steps` events of the engine, with random keys and queries."""
    gen = torch.Generator().manual_seed(1)
    held, state, keys = None, {}, None
    seen = prompt
    for _ in range(steps):
        seen += method.stride
        fresh = torch.arange(seen - method.stride, seen).expand(layers, heads, -1)
        new_keys = torch.randn(layers, heads, method.stride, d, generator=gen)
        held = fresh if held is None else torch.cat([held, fresh], -1)
        keys = new_keys if keys is None else torch.cat([keys, new_keys], 2)
        n = held.shape[-1]
        if n <= method.budget:
            continue
        queries = torch.randn(layers, method.window, heads, d, generator=gen)
        view = KVView.from_tensors(
            keys, keys, queries, scale=1.0, budget=method.budget, prompt=prompt, seen=seen, positions=held
        )
        view.state = state
        scores = method.score(view)
        assert (scores.sum(-1) == method.budget).all()
        index = reference.choose(scores, method.budget, n, method.sinks, n - method.window)
        assert (scores.gather(-1, index) == 1).all()  # the plan holds whatever the engine forces
        held = held.gather(-1, index)
        keys = keys.gather(2, index[..., None].expand(-1, -1, -1, d))
    return held


def test_old_segments_shrink_and_all_heads_hold_equally_many():
    method = ThinkKV(budget=512, window=32)
    held = replay(method, 12)
    counts = torch.stack([(held // 128 == s).sum(-1) for s in range(12)])
    assert (counts == counts[:, :1, :1]).all()
    sizes = counts[:, 0, 0].tolist()
    assert sizes[-1] == 128
    assert sizes[0] <= 8
    assert sum(sizes) == 512


def file(folder: Path, **changes: Any) -> Path:
    """Thresholds for a model of 2 layers."""
    fields = {"layers": (0,), "low": 0.2, "high": 0.4, "model": {"num_hidden_layers": 2}, "notes": {"texts": 1}}
    path = folder / "thoughts.json"
    Thoughts(**fields | changes).save(path)
    think_thresholds.load.cache_clear()
    return path


def test_a_transition_is_shrunk_before_a_reasoning(tmp_path):
    found = []
    for low, high in ((0.0, 1.0), (0.0, 0.0)):  # every typed segment is a reasoning; a transition
        method = ThinkKV(budget=512, window=32, thoughts=str(file(tmp_path, low=low, high=high)))
        held = replay(method, 6)
        found.append([int((held[0, 0] // 128 == s).sum()) for s in range(6)])
    assert found[0] != found[1]
    assert found[0] == [int((replay(ThinkKV(budget=512, window=32), 6)[0, 0] // 128 == s).sum()) for s in range(6)]
    assert sum(found[0]) == sum(found[1]) == 512


def test_the_file_is_read_as_it_was_written(tmp_path):
    path = file(tmp_path, layers=(0, 1))
    found = think_thresholds.load(str(path))
    assert found == Thoughts((0, 1), 0.2, 0.4, {"num_hidden_layers": 2}, {"texts": 1})


@pytest.mark.parametrize(
    "changes", [{"layers": (2,)}, {"layers": ()}, {"low": 0.9}, {"high": 1.5}, {"model": {}}], ids=str
)
def test_a_file_that_cannot_be_is_refused(tmp_path, changes):
    path = file(tmp_path, **changes)
    with pytest.raises(ConfigError, match=r"think_kv.thoughts '.*' holds no thresholds .* `vllm-ext train thoughts`"):
        think_thresholds.load(str(path))


def test_thresholds_of_another_model_or_of_a_part_of_the_heads_are_refused(tmp_path):
    hf = SimpleNamespace(num_hidden_layers=2, head_dim=8)
    method = ThinkKV(thoughts=str(file(tmp_path)))
    cfg = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=hf), parallel_config=SimpleNamespace(tensor_parallel_size=2)
    )
    with pytest.raises(ConfigError, match="was measured on another model: head_dim None \\(model: 8\\); make a file"):
        method.check(cfg)
    hf.head_dim = None
    hf.hidden_size = hf.num_attention_heads = 1
    method = ThinkKV(thoughts=str(file(tmp_path, model=fingerprint(hf))))
    with pytest.raises(ConfigError, match="--tensor-parallel-size 1"):
        method.check(cfg)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"schedule": (8, 16)}, "schedule"), ({"schedule": (256, 64)}, "schedule")],
)
def test_bad_options_are_refused(options, word):
    with pytest.raises(ConfigError, match=f"think_kv.{word}"):
        ThinkKV(**options)
