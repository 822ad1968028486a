"""Each kernel of the eviction engine against its byte floor, for the Llama-3.1-8B shape; needs CUDA."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from vllm_ext.options import ConfigError

LAYERS, HEADS, GROUP, DIM, BLOCK, WINDOW = 32, 8, 4, 128, 32, 32


def run(lengths: tuple[int, ...] = (16384, 1280), ratio: float = 0.2) -> list[dict[str, Any]]:
    """Seconds, bytes that must move and achieved bytes/s of every kernel for requests of `lengths` resident tokens.

    Raises:
        ConfigError: no CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("the kernel benchmark needs a CUDA device.")
    from vllm_ext.bench.shapes import copy_bandwidth

    bandwidth = copy_bandwidth()
    rows = []
    for n in lengths:
        for name, moved, call in _calls(n, ratio):
            seconds = _time(call)
            rows.append({
                "kernel": name, "tokens": n, "seconds": seconds, "bytes": moved, "bytes_per_s": moved / seconds,
                "of_floor": moved / bandwidth / seconds,
            })  # fmt: skip
    return [{"copy_bandwidth": bandwidth, "kernels": rows}]


def _calls(n: int, ratio: float) -> list[tuple[str, int, Callable[[], Any]]]:
    """(name, bytes, call) of each kernel; one layer where a launch serves one layer, else all layers."""
    import torch

    from vllm_ext.kernels.kv_compact import LayerCaches
    from vllm_ext.kernels.kv_redundancy import redundancy
    from vllm_ext.kernels.kv_select import choose
    from vllm_ext.kernels.kv_window_score import WindowScore

    blocks, element = n // BLOCK, 2
    kept = int(n * ratio) // BLOCK * BLOCK
    make = {"dtype": torch.bfloat16, "device": "cuda"}
    caches = [torch.randn(blocks + 1, HEADS, BLOCK, 2 * DIM, **make) for _ in range(LAYERS)]
    row = (torch.randperm(blocks, device="cuda") + 1).int()
    queries = torch.randn(WINDOW, HEADS * GROUP, DIM, **make)
    scores = torch.rand(LAYERS, HEADS, n, device="cuda")
    survivors = choose(scores, kept, n, 4, n - WINDOW)
    layers, token = LayerCaches(caches), HEADS * DIM * element
    few = layers.gather(row, 0, n, range(min(4, LAYERS)))
    keys = few[..., :DIM].contiguous()
    calls: list[tuple[str, int, Callable[[], Any]]] = [
        ("window score, mean, a layer", 2 * n * token,
         lambda: WindowScore(queries, caches[0][..., :DIM], row, 0, n, DIM**-0.5).heads_sum()),
        ("window score, worst case pool 5, a layer", 2 * n * token,
         lambda: WindowScore(queries, caches[0][..., :DIM], row, 0, n, DIM**-0.5).worst(5)),
        ("select, all layers", LAYERS * HEADS * n * 4, lambda: choose(scores, kept, n, 4, n - WINDOW)),
        ("compact, all layers", LAYERS * kept * 4 * token, lambda: layers.compact(row, survivors, 0, n - kept)),
        ("gather, 4 layers", 4 * n * 4 * token, lambda: layers.gather(row, 0, n, range(4))),
    ]  # fmt: skip
    if n <= 4096:
        calls.append(("redundancy, 4 layers", 4 * n * token, lambda: redundancy(keys, 0.5, 1)))
    return calls


def _time(call: Callable[[], Any]) -> float:
    """Median seconds of 20 calls on the device."""
    import torch

    times = []
    for _ in range(23):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])
