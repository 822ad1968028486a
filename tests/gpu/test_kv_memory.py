"""KV eviction on a GPU: memory beside the cache comes out of the plan; asynchronous scheduling changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_kv import assert_same, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHARE = 0.2
"""Of the device's memory."""


def test_the_device_holds_no_more_than_planned(smollm2_dir: str) -> None:
    """Retentions of `trim_kv` beside a cache that would fill the memory alone: bytes as the allocator counts them."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    import vllm_ext
    from vllm_ext.evaluation.engine import engine

    args: dict[str, Any] = {"max_model_len": 2048, "max_num_seqs": 8, "gpu_memory_utilization": SHARE}
    args |= {"enforce_eager": True} | vllm_ext.engine_args("trim_kv")
    with engine(smollm2_dir, args) as llm:
        layers = get_layers_from_vllm_config(llm.llm_engine.vllm_config, Attention).values()
        cache, side = (sum(x.nbytes for x in part) for part in zip(*((y.kv_cache, y.impl.side) for y in layers)))
        assert side == cache // 64  # 4 bytes beside 2 * 64 channels of 2 bytes
        planned = SHARE * torch.cuda.get_device_properties(0).total_memory
        assert 0.5 * planned < cache + side < torch.cuda.memory_allocated() < planned


def test_asynchronous_scheduling_changes_nothing(smollm2_dir: str) -> None:
    plugin = {"r_kv": {"budget": 128, "stride": 64}}
    one, other = (run(smollm2_dir, plugin, async_scheduling=on) for on in (True, False))
    assert [x["async"] for x in (one, other)] == [True, False]
    for tokens in other["tokens"]:
        assert_same(one, tokens)
    assert one["totals"].compactions == other["totals"].compactions
    assert one["leaked"] == other["leaked"] == 0
