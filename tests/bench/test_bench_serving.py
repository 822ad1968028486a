"""`vllm-ext bench serving`: what it refuses, and the size of its pool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_ext.bench import serving_plot
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


def cell(load: str, ratio: float, **more: Any) -> dict[str, Any]:
    """A cell as `bench serving` writes it."""
    return {
        "load": load, "seconds": 10.0, "tokens_per_s": 50.0 * ratio, "ratio": ratio,
        "peak_running": 4, "preemptions": 1, "prompt_share": 0.25, "prompt_tokens": 80,
        "ttft_p50_s": 1.0, "ttft_p99_s": 2.0, "tpot_p50_s": 0.01, "tpot_p99_s": 0.02,
        "timeline": [[0.0, 0.3, 1], [0.3, 0.9, 4]],
    } | more  # fmt: skip


def record(*cells: tuple[str, float]) -> dict[str, Any]:
    evicted = {"evictions": {"compactions": 2, "host_s": 0.5, "device_s": None}}
    rows = [
        {"label": "dense", "cells": [cell(n, 1.0) for n, _ in cells]},
        {"label": "snapkv", "cells": [cell(n, r, **evicted) for n, r in cells]},
    ]
    about = {"pool_bytes": 1 << 30, "pool_tokens": 40, "num_blocks": 10, "block_size": 32}
    return {"command": "bench serving", "settings": {"shape": "tiny"}, "results": [r | about for r in rows]}


def test_the_crossover_is_made_of_all_records(tmp_path: Path) -> None:
    records = [record(("8x10+5", 1.8), ("1x15+5", 0.95)), record(("2x15+5", 1.1))]
    assert serving_plot.crossover(records) == {"snapkv": [(0.5, 0.95), (1.0, 1.1), (3.0, 1.8)]}
    files = [tmp_path / f"{i}.json" for i in range(2)]
    for file, data in zip(files, records):
        file.write_text(json.dumps(data))
    assert serving_plot.read(files) == records
    assert serving_plot.plot(records, tmp_path / "x.png").stat().st_size > 1000
    (tmp_path / "other.json").write_text('{"command": "eval", "results": []}')
    with pytest.raises(ConfigError, match=r"other.json is no record of `vllm-ext bench serving`"):
        serving_plot.read([tmp_path / "other.json"])


def test_the_table_of_a_record_says_where_the_time_went() -> None:
    from vllm_ext.results_kv import KINDS

    title, make = KINDS["bench serving"]
    data = record(("8x10+5", 1.8))
    assert title(data) == "Serving, tiny shape, dummy weights, 1.0 GiB of KV cache in every row"
    *_, stock, plugin = make(data).splitlines()
    assert stock == "| 8x10+5 | 3.0x | stock | 50 | 1.00x | 4 | 1 | 1.0 / 2.0 | 10.0 / 20.0 | 25% | – |"
    assert plugin == "| 8x10+5 | 3.0x | `snapkv` | 90 | 1.80x | 4 | 1 | 1.0 / 2.0 | 10.0 / 20.0 | 25% | 5.0% |"


def test_the_table_of_kernels() -> None:
    from vllm_ext.results_kv import KINDS

    kernel = {"kernel": "select", "tokens": 1280, "seconds": 2e-5, "bytes": 1 << 20, "bytes_per_s": 5e10}
    kernel["of_floor"] = 0.5
    title, make = KINDS["bench kv kernels"]
    step = {"requests": 16, "seconds": 1.5e-3, "host_seconds": 1e-3}
    data = {"results": [{"copy_bandwidth": 2.5e12, "kernels": [kernel], "r_kv_evictions": [step]}]}
    assert "2.50 TB/s" in title(data)
    *_, row, last = make(data).splitlines()
    assert row == "| select | 1280 | 20.0 | 1.0 | 50 | 50% |"
    assert last == "| a whole step in which 16 requests evict (r_kv) |  | 1500 |  |  |  |"
