"""`vllm-ext bench serving`: what it refuses, and the size of its pool."""

from __future__ import annotations

import pytest

from vllm_ext.bench.serving import Load, ServingPlan, parse_load, parse_serving_row
from vllm_ext.bench.shapes import load_shape
from vllm_ext.options import ConfigError


def test_loads_and_rows() -> None:
    assert parse_load("64x16384+512") == Load(64, 16384, 512)
    assert parse_load("64x16384+512").label == "64x16384+512"
    assert parse_serving_row("vllm:kv_cache_dtype=fp8").extra == {"kv_cache_dtype": "fp8"}
    assert parse_serving_row("snapkv:ratio=0.2").row.options == {"snapkv": {"ratio": 0.2}}
    for text in ("64", "64x100", "0x100+5", "64x100+"):
        with pytest.raises(ConfigError, match="--load"):
            parse_load(text)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"loads": ()}, "--load"),
        ({"pool": 0.5}, "--pool"),
        ({"rate": 0.0}, "--rate"),
        ({"loads": (Load(1, 300000, 10),)}, "positions"),
        ({"loads": (Load(1, 10, 10), Load(1, 5000, 10))}, "--pool does not hold"),
    ],
)
def test_plans_that_time_nothing(changes: dict, word: str) -> None:
    plan = {"config": load_shape("tiny"), "loads": (Load(4, 100, 20),), "pool": 4.0} | changes
    with pytest.raises(ConfigError, match=word):
        ServingPlan(**plan).check()


def test_the_pool_is_bytes_of_stock_requests() -> None:
    """Llama-3.1-8B holds 128 KiB a token."""
    plan = ServingPlan(load_shape("llama-3.1-8b"), (Load(64, 16384, 512),), 10)
    assert plan.pool_bytes == 10 * (16384 + 512 + 32) * 128 * 1024
    args = plan.engine_args(parse_serving_row("vllm:kv_cache_dtype=fp8"))
    assert args["kv_cache_memory_bytes"] == plan.pool_bytes
    assert args["kv_cache_dtype"] == "fp8"
