"""Kept tokens equal those of the plain formulas; identities hold only if the papers' methods are implemented."""

from __future__ import annotations

import numpy as np
import plain_scores as plain
import pytest
import torch

from vllm_ext.kernels import kv_reference as reference
from vllm_ext.kernels import kv_score_defensive, kv_score_proto, kv_score_rest, kv_score_trim
from vllm_ext.kv_managers.defensive_kv import DefensiveKV
from vllm_ext.kv_managers.proto_kv import ProtoKV
from vllm_ext.kv_managers.rest_kv import ReSTKV
from vllm_ext.kv_managers.snapkv import SnapKV
from vllm_ext.kv_managers.trim_kv import TrimKV
from vllm_ext.kv_managers.view import KVView

SHAPES = [(2, 1, 97, 8, 16), (2, 3, 160, 16, 32), (1, 4, 211, 32, 8)]
"""KV heads, group, tokens, window, head size."""
HIDDEN = 48


def tensors(heads, group, n, w, d, seed=0, layers=2):
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=gen)

    # Neighbouring keys resemble each other, as in a text.
    keys = draw(layers, heads, n, d) + 0.7 * draw(layers, heads, n // 8 + 1, d).repeat_interleave(8, 2)[:, :, :n]
    return {
        "queries": draw(layers, w, heads * group, d), "keys": keys, "values": draw(layers, heads, n, d),
        "output_weights": [draw(heads * group, d, HIDDEN) for _ in range(layers)],
    }  # fmt: skip


def view_of(t, budget, **more):
    return KVView.from_tensors(**t, scale=t["keys"].shape[-1] ** -0.5, budget=budget, **more)


def kept(method, view):
    """What the engine keeps: [L, H, budget] ascending indices."""
    w = view.queries.shape[1]
    return reference.choose(method.score(view), view.budget, view.chosen, method.sinks, view.n - w)


def best(scores, count, n, w):
    """The same from plain scores [H, n - w], without sinks."""
    out = []
    for row in scores:
        order = sorted(range(len(row)), key=lambda j: (-row[j], -j))[: count - w]
        out.append(sorted([*order, *range(n - w, n)]))
    return out


def layer(t, i):
    """One layer's queries, keys, values, weight in numpy float64."""
    parts = (t["queries"][i], t["keys"][i], t["values"][i], t["output_weights"][i])
    return tuple(p.double().numpy() for p in parts)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("norm", "over"), [("l1", "tokens"), ("l2", "tokens"), ("l1", "heads")])
def test_defensive_keeps_the_plain_formulas_tokens(shape, norm, over):
    _, _, n, w, d = shape
    t, budget = tensors(*shape), n // 4
    method = DefensiveKV(window=w, sinks=0, ratio=1.0, norm=norm, norm_over=over, mass=0.5)
    found = kept(method, view_of(t, budget))
    for i in range(2):
        scores = plain.defensive(*layer(t, i), d**-0.5, budget=budget, norm=norm, over=over, mass=0.5)
        assert found[i].tolist() == best(scores, budget, n, w)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("beta", "group"), [(2000.0, "mean"), (4.0, "mean"), (4.0, "max")])
def test_rest_keeps_the_plain_formulas_tokens(shape, beta, group):
    _, _, n, w, d = shape
    t, budget = tensors(*shape, seed=1), n // 4
    method = ReSTKV(window=w, sinks=0, beta=beta, drift="rank", group=group)
    found = kept(method, view_of(t, budget))
    for i in range(2):
        scores = plain.rest(*layer(t, i), d**-0.5, budget=budget, beta=beta, group=group)
        assert found[i].tolist() == best(scores, budget, n, w)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("anchors", [0, 12])
def test_proto_keeps_the_plain_formulas_tokens(shape, anchors):
    heads, _, n, w, d = shape
    t, budget = tensors(*shape, seed=2), n // 3
    method = ProtoKV(window=w, sinks=0, anchors=anchors, chunks=20)
    found = kept(method, view_of(t, budget))

    def bucket(keys, kv):
        return kv_score_proto.hash_buckets(torch.tensor(keys, dtype=torch.float32)[None], method.bits)[0].tolist()

    for i in range(2):
        queries, keys, _, _ = layer(t, i)
        sets = plain.proto(
            queries, keys, d**-0.5, budget=budget, reach=method.reach, anchors=anchors, chunks=20, bucket=bucket
        )
        for kv in range(heads):
            assert set(found[i, kv].tolist()) == sets[kv] | set(range(n - w, n))


def test_trim_keeps_the_plain_formulas_tokens():
    gen = torch.Generator().manual_seed(3)
    log_beta = -torch.rand(2, 3, 120, generator=gen)
    positions = torch.stack([torch.randperm(500, generator=gen)[:120].sort().values for _ in range(6)]).view(2, 3, 120)
    t = tensors(3, 1, 120, 1, 8)
    view = view_of(t, 40, positions=positions, side=log_beta[..., None], seen=500)
    method = TrimKV(window=1, sinks=0, budget=32, block_size=32)
    found = kept(method, view)
    for i in range(2):
        scores = plain.trim(log_beta[i].double().numpy(), positions[i].numpy(), 500)
        assert found[i].tolist() == best(scores[:, :-1], 40, 120, 1)


# ------------------------------------------------------------------------------------------------ identities
def test_trim_with_one_retention_is_a_sliding_window_and_with_kept_sinks_streaming():
    n, budget = 90, 32
    positions = torch.arange(n).expand(1, 2, n)
    log_beta = torch.full((1, 2, n), -0.01)
    scores = kv_score_trim.retention_scores(log_beta, positions, n)
    recent = list(range(n - budget, n))
    assert reference.choose(scores, budget, n, 0, n)[0, 0].tolist() == recent
    log_beta[..., :4] = 0
    scores = kv_score_trim.retention_scores(log_beta, positions, n)
    assert reference.choose(scores, budget, n, 0, n)[0, 1].tolist() == [0, 1, 2, 3, *recent[4:]]
    everything = kv_score_trim.retention_scores(torch.zeros(1, 2, n), positions, n)
    assert reference.choose(everything, budget, n, 0, n)[0, 0].tolist() == recent


def test_defensive_with_one_query_and_no_floor_or_values_is_snapkv():
    t = tensors(2, 1, 120, 1, 16)
    view = view_of(t, 40)
    worst = view.attention_max(5, 119)
    snap = SnapKV(window=1, sinks=0).score(view)[..., :119]
    inner = slice(2, -2)  # SnapKV pools the window's column too, which the worst case leaves out
    ratio = worst[..., inner] / snap[..., inner]
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-4, atol=0)


def test_defensive_floor_ties_all_tokens_below_the_mean_and_the_newest_stay():
    worst = torch.zeros(1, 1, 50)
    worst[..., [3, 17]] = 1.0
    floored = kv_score_defensive.with_floor(worst)
    assert torch.unique(floored).tolist() == [pytest.approx(2 / 50), 1.0]
    assert reference.choose(floored, 6, 50, 0, 50)[0, 0].tolist() == [3, 17, 46, 47, 48, 49]


def test_defensive_first_stage_takes_the_fewest_tokens_and_at_most_the_room():
    mean = torch.tensor([[0.05, 0.4, 0.1, 0.25, 0.2]])  # the last token is the window
    assert kv_score_defensive.first_stage(mean, 4, 4, 0.9)[0].tolist() == [False, True, True, True, False][:4]
    assert kv_score_defensive.first_stage(mean, 4, 1, 0.9)[0].tolist() == [False, True, False, False]
    assert not kv_score_defensive.first_stage(mean, 4, 4, 0.2).any()


def test_rest_score_of_the_last_query_is_the_change_of_the_output():
    heads, group, n, w, d = 2, 2, 60, 4, 16
    t = tensors(heads, group, n, w, d)
    weights = kv_score_rest.moving_average(w, 1.0)
    assert weights.tolist() == [0, 0, 0, 1]
    view = view_of(t, 20)
    attention = view.attention_heads(weights)[0]
    found = kv_score_rest.reconstruction(attention, t["values"][0], view.output_gram(0))
    expected = plain.removal(*layer(t, 0), d**-0.5)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-5)


def test_rest_moving_average_is_the_recursion():
    weights, a = kv_score_rest.moving_average(6, 0.3), np.random.default_rng(0).random(6)
    smooth = a[0]
    for x in a[1:]:
        smooth = 0.3 * x + 0.7 * smooth
    assert float(weights.double() @ torch.tensor(a)) == pytest.approx(smooth, rel=1e-5)


def test_rest_drift_of_a_moving_peak_has_the_same_sign_by_centroids_and_by_ranks():
    rows = torch.full((1, 8, 200), 1e-4)
    for i in range(8):
        rows[0, i, 50 + 5 * i : 56 + 5 * i] = 1.0
    early, late = rows[:, :4].mean(1), rows[:, 4:].mean(1)
    by_centroid = kv_score_rest.centroid_drift(early, late)
    by_rank = kv_score_rest.rank_drift(rows, 6)
    assert by_rank.item() == pytest.approx(-20)
    assert -21 < by_centroid.item() < -18


def test_proto_without_anchors_is_a_chunk_method():
    heads, n, w, d, size = 2, 128, 8, 32, 8
    t = tensors(heads, 2, n, w, d)
    chunks = (n - w) // size
    axes = torch.eye(d)[torch.arange(chunks) % d].repeat_interleave(size, 0)  # every chunk has a direction of its own
    t["keys"][:, :, : n - w] = axes + 0.01 * t["keys"][:, :, : n - w]
    view = view_of(t, 5 * size + w)
    found = kept(ProtoKV(window=w, sinks=0, anchors=0, chunks=chunks), view)
    mean = view.attention_mean()[0, 0, : n - w].view(chunks, size).mean(-1)
    expected = sorted(i * size + j for i in mean.topk(5).indices.tolist() for j in range(size))
    assert found[0, 0].tolist() == [*expected, *range(n - w, n)]


def test_proto_with_a_prototype_a_token_is_snapkv_without_pooling():
    shape = (2, 3, 140, 16, 32)
    t = tensors(*shape, seed=5)
    t["keys"] = torch.randn(t["keys"].shape, generator=torch.Generator().manual_seed(9))
    view = view_of(t, 50)
    found = kept(ProtoKV(window=16, sinks=0, anchors=0, chunks=10_000), view)
    assert torch.equal(found, kept(SnapKV(window=16, sinks=0, pool=1), view))


def test_proto_keeps_clusters_whole():
    cluster = torch.tensor([[0, 1, 0, 2, 1, 2, 2, 0]])
    tokens = torch.tensor([[0.1, 0.2, 0.3, 0.9, 0.4, 0.1, 0.2, 0.5]])
    score = torch.tensor([[1.0, 3.0, 2.0]])
    worth = kv_score_proto.whole_clusters_first(cluster, score, tokens)
    assert worth[0].argsort(descending=True).tolist() == [4, 1, 3, 6, 5, 7, 2, 0]
    assert len(set(worth[0].tolist())) == 8


@pytest.mark.parametrize("method", [DefensiveKV(), ReSTKV(), ProtoKV()])
def test_scores_are_finite_where_attention_is_not_spread(method):
    t = tensors(2, 2, 100, 32, 16)
    t["queries"] *= 1000  # every row's attention is one token
    found = method.score(view_of(t, 64))
    assert found.shape == (2, 2, 100)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


@pytest.mark.parametrize("method", [DefensiveKV(), ReSTKV(), ProtoKV()])
def test_scores_do_not_depend_on_how_layers_are_portioned(method):
    t = tensors(2, 2, 100, 32, 16, layers=3)
    whole = method.score(view_of(t, 64))
    one = {k: v[1:2] for k, v in t.items()}
    torch.testing.assert_close(method.score(view_of(one, 64)), whole[1:2], rtol=1e-5, atol=1e-7)
