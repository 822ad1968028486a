"""Tensor parallelism: a rank that holds some of the KV heads keeps what one that holds all of them keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_ext.kernels import kv_reference as reference
from vllm_ext.kv_managers.proto_kv import ProtoKV
from vllm_ext.kv_managers.r_kv import RKV
from vllm_ext.kv_managers.snapkv import SnapKV
from vllm_ext.kv_managers.streaming_llm import StreamingLLM
from vllm_ext.kv_managers.think_kv import ThinkKV
from vllm_ext.kv_managers.trim_kv import TrimKV
from vllm_ext.kv_managers.view import KVView

HEADS, GROUP, N, DIM = 4, 2, 320, 16
METHODS: dict[str, Any] = {
    "snapkv": SnapKV(budget=64, window=16),
    "r_kv": RKV(budget=64),
    "streaming_llm": StreamingLLM(budget=64, window=16),
    "proto_kv": ProtoKV(budget=64, window=16, anchors=8, chunks=12),
    "think_kv": ThinkKV(budget=64, window=16),
    "trim_kv": TrimKV(budget=64),
}


def kept(method: Any, heads: slice) -> torch.Tensor:
    gen = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 2, HEADS, N, DIM, generator=gen)
    queries = torch.randn(2, method.window, HEADS, GROUP, DIM, generator=gen)
    side = -torch.rand(2, HEADS, N, 1, generator=gen)
    view = KVView.from_tensors(
        keys[:, heads], values[:, heads], queries[:, :, heads].flatten(2, 3), scale=0.25, budget=64,
        side=side[:, heads],
    )  # fmt: skip
    return reference.choose(method.score(view).float(), 64, N, method.sinks, N - method.window)


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_keep_what_one_keeps(name: str) -> None:
    whole = kept(METHODS[name], slice(0, HEADS))
    ranks = [kept(METHODS[name], slice(i, i + HEADS // 2)) for i in (0, HEADS // 2)]
    assert torch.equal(torch.cat(ranks, 1), whole)
