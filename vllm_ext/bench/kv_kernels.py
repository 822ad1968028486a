"""Each kernel of the eviction engine against its floor, and whole evictions, for the Llama-3.1-8B shape; needs CUDA.

A floor is the larger of two times: the bytes that must move over the measured copy bandwidth, and the products that
must be formed over the measured rate of large bf16 products. Kernels are timed as replays of a CUDA graph, without what
the host needs to launch them; an eviction as a step pays for it, launches included.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_ext.options import ConfigError

LAYERS, HEADS, GROUP, DIM, BLOCK = 32, 8, 4, 128, 32
ELEMENT = 2
TOKEN = HEADS * DIM * ELEMENT
"""Bytes of a token's keys in a layer."""
TOGETHER = 16
"""Requests that evict in one step."""


@dataclass(frozen=True)
class Case:
    """Resident tokens of a request, survivors, queries that score."""

    n: int
    kept: int
    window: int


CASES = (Case(16384, 3264, 32), Case(1152, 1024, 8))
"""A long prompt at a ratio of 0.2, and r_kv's steady state with its defaults."""


def run(cases: tuple[Case, ...] = CASES) -> list[dict[str, Any]]:
    """Seconds, bytes and FLOP that cannot be avoided, and the share of the time that these would take, of every kernel.

    Raises:
        ConfigError: no CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("the kernel benchmark needs a CUDA device.")
    from vllm_ext.bench.shapes import copy_bandwidth

    bandwidth, rate = copy_bandwidth(), product_rate()
    rows = []
    for case in cases:
        for name, moved, flop, call in calls(case):
            seconds = replay_seconds(call)
            floor = max(moved / bandwidth, flop / rate)
            rows.append({
                "kernel": name, "tokens": case.n, "seconds": seconds, "bytes": moved, "flop": flop,
                "bytes_per_s": moved / seconds, "of_floor": floor / seconds,
            })  # fmt: skip
    evictions = [{"requests": r, **eviction_seconds(CASES[-1], r)} for r in (1, TOGETHER)]
    return [{"copy_bandwidth": bandwidth, "product_rate": rate, "kernels": rows, "r_kv_evictions": evictions}]


def calls(case: Case) -> list[tuple[str, int, int, Callable[[], Any]]]:
    """(name, bytes, FLOP, call) of each kernel for one request in all layers."""
    import torch

    from vllm_ext.kernels.kv_compact import LayerCaches
    from vllm_ext.kernels.kv_redundancy import redundancy
    from vllm_ext.kernels.kv_select import choose
    from vllm_ext.kernels.kv_window_score import WindowScore

    n, kept, w = case.n, case.kept, case.window
    make = {"dtype": torch.bfloat16, "device": "cuda"}
    caches = [torch.randn(n // BLOCK + 1, HEADS, BLOCK, 2 * DIM, **make) for _ in range(LAYERS)]
    row = (torch.randperm(n // BLOCK, device="cuda") + 1).int()[None]
    queries = torch.randn(LAYERS, w, HEADS * GROUP, DIM, **make)
    scores = torch.rand(1, LAYERS, HEADS, n, device="cuda")
    survivors = choose(scores, kept, n, 4, n - w)
    both, keys = LayerCaches(caches), LayerCaches([c[..., :DIM] for c in caches])
    moves = int((survivors != torch.arange(n - kept, n, device="cuda")).sum())
    read, window = LAYERS * n * TOKEN, LAYERS * 2 * w * HEADS * GROUP * DIM * n

    def score() -> WindowScore:
        return WindowScore(queries, keys, row, n, DIM**-0.5)

    found: list[tuple[str, int, int, Callable[[], Any]]] = [
        ("window score, mean, all layers", read, window, lambda: score().mean()),
        ("window score, worst case pool 5, all layers", read, window, lambda: score().worst(5)),
        ("select, all layers", LAYERS * HEADS * (n * 4 + kept * 8), 0, lambda: choose(scores, kept, n, 4, n - w)),
        ("compact, all layers", moves * 4 * DIM * ELEMENT, 0, lambda: both.compact(row, survivors, n - kept)),
        ("gather, 4 layers", 4 * n * 4 * TOKEN, 0, lambda: both.gather(row, 0, n, range(4))),
    ]
    if n <= 4096:
        pairs = LAYERS * HEADS * n * (n - 1) // 2
        found.append(
            ("redundancy, all layers", read, pairs * 2 * DIM, lambda: redundancy(keys, row, n, 0.5, 1))
        )  # no two keys of noise are alike: nothing ends early
    return found


def replay_seconds(call: Callable[[], Any]) -> float:
    """Median seconds of a graph's replay, of 20. The capture waits for the inputs: it runs on a stream of its own."""
    import torch

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    torch.cuda.synchronize()
    return _median(graph.replay)


def _median(call: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> float:
    """Median seconds of 20 calls between two events; the device is idle before each."""
    import torch

    times = []
    for _ in range(23):
        prepare()
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def product_rate(size: int = 8192) -> float:
    """FLOP/s of a bf16 product of two square matrices."""
    import torch

    a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device="cuda")
    return 2 * size**3 / replay_seconds(lambda: a @ b)


def eviction_seconds(case: Case, requests: int) -> dict[str, float]:
    """Seconds of one step of r_kv in which `requests` evict: until the device is done, and on the host."""
    import torch

    from vllm_ext.kv_managers.compactor import Compactor, Layer, Request
    from vllm_ext.kv_managers.counts import Counts
    from vllm_ext.kv_managers.device_ops import DeviceOps
    from vllm_ext.kv_managers.r_kv import RKV
    from vllm_ext.kv_managers.rows import Row

    method, blocks = RKV(budget=case.kept, window=case.window, stride=case.n - case.kept), case.n // BLOCK
    make = {"dtype": torch.bfloat16, "device": "cuda"}
    ops = DeviceOps()
    compactor = Compactor(Counts(method), ring_slots=requests, scale=DIM**-0.5, fused=ops)
    for i in range(LAYERS):
        cache = torch.randn(requests * blocks + 1, HEADS, BLOCK, 2 * DIM, **make)
        ring = torch.randn(requests, case.window, HEADS * GROUP, DIM, **make)
        compactor.layers.append(Layer(i, cache, cache[..., :DIM], cache[..., DIM:], ring, None, None))
    ops.bind(compactor.layers)
    table = (torch.randperm(requests * blocks, device="cuda") + 1).int().view(requests, blocks)
    rows = [Row(str(r), case.n, case.n + 1, case.kept) for r in range(requests)]

    def prepare() -> None:
        compactor.free_rings = []
        compactor.requests = {row.request: Request(0, case.n, case.n, r) for r, row in enumerate(rows)}

    def step() -> list[int]:
        return compactor.begin_step(rows, table.__getitem__)

    seconds = _median(step, prepare)
    assert compactor.totals.compactions == 23 * requests
    return {"seconds": seconds, "host_seconds": compactor.totals.seconds / 23}
