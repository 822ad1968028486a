"""DefensiveKV, ReST-KV, ProtoKV, ThinKV and TRIM-KV behind the worker's compactor, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_compactor import DEVICE, DIM, GROUP, HEADS, Worker, serve

from vllm_ext.kv_managers.defensive_kv import DefensiveKV
from vllm_ext.kv_managers.proto_kv import ProtoKV
from vllm_ext.kv_managers.rest_kv import ReSTKV
from vllm_ext.kv_managers.think_kv import ThinkKV
from vllm_ext.kv_managers.trim_kv import TrimKV

ONE_SHOT = {
    "defensive_kv": DefensiveKV(budget=64, window=16),
    "defensive_kv l1": DefensiveKV(ratio=0.4, window=16, norm="l1", scope="layer"),
    "rest_kv": ReSTKV(budget=64, window=16),
    "proto_kv": ProtoKV(budget=64, window=16, anchors=8, chunks=12),
}
METHODS: dict[str, Any] = ONE_SHOT | {
    "think_kv": ThinkKV(budget=96, stride=64, window=16, schedule=(32, 16, 8)),
    "trim_kv": TrimKV(budget=64, stride=32, window=8),
}


def worker(name: str) -> Worker:
    """The harness with output projections, and log retentions in every slot."""
    made = Worker(METHODS[name])
    gen = torch.Generator().manual_seed(7)
    for layer in made.compactor.layers:
        weight = torch.randn(HEADS * GROUP, DIM, 48, generator=gen).to(DEVICE)
        layer.weight = lambda weight=weight: weight
        if made.method.side_values:
            layer.side = -torch.rand(*layer.keys.shape[:3], 1, generator=gen).to(DEVICE)
    return made


@pytest.mark.parametrize("name", METHODS)
def test_attention_reads_exactly_what_was_kept(name: str) -> None:
    made = worker(name)
    kept = serve(made, [40, 97, 200, 300], 150, 64)
    assert made.worst < 1e-6
    assert len(kept) >= 2
    assert made.compactor.totals.tokens_dropped > 0


@pytest.mark.parametrize("name", ONE_SHOT)
def test_chunks_do_not_change_what_a_prompt_keeps(name: str) -> None:
    found = [serve(worker(name), [300, 200], 10, chunk) for chunk in (7, 64, 512)]
    for other in found[1:]:
        assert all(torch.equal(found[0][n], other[n]) for n in found[0])


@pytest.mark.parametrize("name", METHODS)
def test_warm_up_leaves_nothing_behind(name: str) -> None:
    from vllm_ext.kv_managers import warm_up

    made = worker(name)
    compactor = made.compactor
    steps: Any = SimpleNamespace(counts=compactor.counts, compactor=compactor, layers=lambda runner: compactor.layers)
    warm_up.run(steps, None, 2000)
    assert compactor.requests == {}
    assert compactor.totals.compactions == 0


def test_retentions_move_with_their_tokens() -> None:
    """After evictions a slot's stored value is that of the token which the position says."""
    made = worker("trim_kv")
    request = made.admit("r", 200, 400, 3)
    for layer in made.compactor.layers:
        for position in range(400):  # a value that names its token
            page = request["row"][position // 32]
            layer.side[page, :, position % 32] = -(position + 1.0) / 1000
    for before in range(0, 400, 40):
        made.step(request, before, before + 40)
    found = made.compactor.requests["r"]
    assert found.start > 0
    slots = torch.arange(found.start, found.start + found.positions.shape[-1])
    for i, layer in enumerate(made.compactor.layers):
        stored = layer.side[request["row"][slots // 32].long(), :, slots % 32, 0].T
        torch.testing.assert_close(stored, -(found.positions[i] + 1.0) / 1000)
