"""Model shapes for dummy-weight engines, and the bytes a decode step cannot avoid reading.

Every number of a shape is the public model's, except `max_position_embeddings`, raised to 262144 so that 128K
contexts with their output fit. `tiny` is no public model: it checks the command in seconds.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
from pathlib import Path
from typing import Any

from vllm_ext.models import cache_dir
from vllm_ext.options import ConfigError, did_you_mean

ELEMENT = 2
"""Bytes of a weight or cached value (bf16)."""


def names() -> list[str]:
    """Known shapes."""
    folder = importlib.resources.files("vllm_ext.bench").joinpath("shapes")
    return sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))


def load_shape(name: str) -> dict[str, Any]:
    """The `config.json` of a shape.

    Raises:
        ConfigError: unknown name.
    """
    if name not in names():
        raise ConfigError(f"--shape '{name}' is unknown{did_you_mean(name, names())}")
    file = importlib.resources.files("vllm_ext.bench").joinpath("shapes", f"{name}.json")
    return json.loads(file.read_text())


def model_dir(config: dict[str, Any]) -> Path:
    """A cached model directory without weights, for `load_format="dummy"`.

    One path a shape: vLLM's compilation cache goes by the path, so that a second run of the same row starts faster.
    """
    text = json.dumps(config, indent=1)
    folder = cache_dir() / "shapes" / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"config.json.{os.getpid()}"
    part.write_text(text)
    part.rename(folder / "config.json")
    return folder


def head_size(config: dict[str, Any]) -> int:
    """Channels of one attention head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def weight_bytes(config: dict[str, Any], batch: int | None = None) -> int:
    """Bytes of the weights that one decode step reads: every layer and the output head, not the embedding rows.

    Args:
        config: the shape.
        batch: requests of the step. Of experts, it reads those that uniform routing hits; None = all.
    """
    hidden, inner, d = config["hidden_size"], config["intermediate_size"], head_size(config)
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    layer = hidden * (q + 2 * kv) + q * hidden + 2 * hidden
    if experts := config.get("num_experts"):
        missed = 0.0 if batch is None else (1 - config["num_experts_per_tok"] / experts) ** batch
        inner = config.get("moe_intermediate_size", inner)
        layer += experts * hidden + round(experts * (1 - missed)) * 3 * hidden * inner
    else:
        layer += 3 * hidden * inner
    if config["model_type"] == "qwen2":
        layer += q + 2 * kv  # biases of q, k and v
    if config["model_type"] in ("qwen3", "qwen3_moe"):
        layer += 2 * d  # norms of q and k
    if config["model_type"] == "olmoe":
        layer += q + kv  # norms of q and k over all heads
    return ELEMENT * (config["num_hidden_layers"] * layer + hidden + config["vocab_size"] * hidden)


def kv_bytes(config: dict[str, Any], lengths: list[float], plugin: Any = None) -> float:
    """Bytes of keys, values and page index that one decode step of a batch must read.

    Args:
        config: the shape.
        lengths: keys of each request.
        plugin: a `SparseMethod`, or None for dense attention.
    """
    layers = config["num_hidden_layers"]
    row = config["num_key_value_heads"] * head_size(config) * ELEMENT
    total = 0.0
    for length in lengths:
        dense = 2 * row * length
        if plugin is None or length <= plugin.dense_limit:
            total += layers * dense
            continue
        pages = length // plugin.page_size
        index = pages * plugin.record_elements(head_size(config)) * config["num_key_value_heads"] * ELEMENT
        if plugin.score == "exact":
            index += row * length  # every key is read to choose
        kept = 2 * row * min(plugin.least_keys, length)
        exact = sum(1 for i in plugin.dense_layers if 0 <= i < layers)
        whole = getattr(plugin, "dense_share", 0.0)  # of the heads of sparse layers
        total += exact * dense + (layers - exact) * (whole * dense + (1 - whole) * kept + index)
    return total


def copy_bandwidth() -> float:
    """Copy bandwidth of the device in bytes/s, read plus written: median of 20 copies of 1 GiB (CPU: 128 MiB)."""
    import statistics
    import time

    import torch

    cuda = torch.cuda.is_available()
    source = torch.empty(2**30 if cuda else 2**27, dtype=torch.uint8, device="cuda" if cuda else "cpu").random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(23):
        if cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - start)
    del source, target
    if cuda:
        torch.cuda.empty_cache()
    return 2 * (2**30 if cuda else 2**27) / statistics.median(times[3:])
