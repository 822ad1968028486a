"""One expert layer: the SonicMoE kernels beside vLLM's Triton `fused_experts`, untuned and tuned. CUDA only.

bf16, random weights, uniform random routing. A time is the median of CUDA graph replays that walk over several
routings, so that small batches find other experts in the L2 cache than they need. The floor is the larger of two times:
the bytes that cannot be avoided (weights of the experts hit, tokens in, tokens out) at the measured copy bandwidth,
and the FLOPs of the routed pairs at the rate of a large cuBLAS product.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ext.bench.shapes import copy_bandwidth
from vllm_ext.moe.shape import ELEMENT, SHAPES, Shape
from vllm_ext.options import ConfigError, did_you_mean

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass
class Layer:
    """Weights [E, 2n, d] and [E, d, n], and several calls' inputs: hidden [T, d], weights [T, k], ids [T, k]."""

    shape: Shape
    w13: Any
    w2: Any

    def calls(self, tokens: int, count: int, seed: int = 0) -> list[tuple[Any, Any, Any]]:
        """`count` random inputs of `tokens` tokens; the k experts of a token are distinct and uniform."""
        import torch

        generator = torch.Generator("cuda").manual_seed(seed)
        found = []
        for _ in range(count):
            x = torch.randn(tokens, self.shape.d, device="cuda", generator=generator).to(torch.bfloat16)
            logits = torch.randn(tokens, self.shape.experts, device="cuda", generator=generator)
            weights, ids = logits.softmax(-1).topk(self.shape.k, dim=-1)
            found.append((x, weights, ids.int()))
        return found


def make_layer(shape: Shape, seed: int = 0) -> Layer:
    """Random weights of unit gain."""
    import torch

    torch.manual_seed(seed)
    w13 = torch.empty(shape.experts, 2 * shape.n, shape.d, dtype=torch.bfloat16, device="cuda")
    w2 = torch.empty(shape.experts, shape.d, shape.n, dtype=torch.bfloat16, device="cuda")
    for e in range(shape.experts):
        w13[e].normal_(std=shape.d**-0.5)
        w2[e].normal_(std=shape.n**-0.5)
    return Layer(shape, w13, w2)


def routings(tokens: int) -> int:
    """Calls to walk over in a measurement of that many tokens."""
    return 4 if tokens <= 256 else 1


def measure(walk: Callable[[], Any], calls: int, seconds: float = 0.03) -> float:
    """Seconds a call: median of graph replays of `walk`, which makes `calls` calls; about `seconds` of device time."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        walk()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        walk()
    times: list[float] = []
    graph.replay()
    while len(times) < 5 or (sum(times) < seconds and len(times) < 50):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    del graph
    return statistics.median(times) / calls


def matmul_rate(size: int = 8192) -> float:
    """FLOP/s of a square bf16 cuBLAS product."""
    import torch

    a = torch.randn(size, size, device="cuda").to(torch.bfloat16)
    b = torch.randn(size, size, device="cuda").to(torch.bfloat16)
    out = torch.empty_like(a)
    return 2 * size**3 / measure(lambda: torch.mm(a, b.T, out=out), 1)


def floor(shape: Shape, calls: list[tuple[Any, Any, Any]], bandwidth: float, rate: float) -> tuple[float, float]:
    """(seconds of the unavoidable bytes, seconds of the FLOPs) of a call, mean over the routings."""
    tokens = calls[0][0].shape[0]
    hit = statistics.mean(int(ids.unique().numel()) for _, _, ids in calls)
    size = hit * shape.expert_bytes + 2 * ELEMENT * tokens * shape.d
    return size / bandwidth, shape.flops(tokens) / rate


def stock(layer: Layer, calls: list[tuple[Any, Any, Any]], config: dict[str, int] | None) -> Callable[[], list[Any]]:
    """vLLM's Triton experts with a tile configuration; None = whatever vLLM finds for the shape."""
    from vllm.model_executor.layers.fused_moe import fused_experts, override_config

    def walk() -> list[Any]:
        if config is None:
            return [fused_experts(x, layer.w13, layer.w2, w, ids) for x, w, ids in calls]
        with override_config(config):
            return [fused_experts(x, layer.w13, layer.w2, w, ids) for x, w, ids in calls]

    return walk


def sonic(layer: Layer, calls: list[tuple[Any, Any, Any]], tiles: Any) -> Callable[[], list[Any]]:
    """The SonicMoE kernels with `tiles`."""
    from vllm_ext.kernels.sonic_moe import sonic_moe

    return lambda: [sonic_moe(x, layer.w13, layer.w2, w, ids, tiles) for x, w, ids in calls]


def default_config(shape: Shape, tokens: int) -> dict[str, int]:
    """The tiles that vLLM takes without a tuned file."""
    from vllm.model_executor.layers.fused_moe.fused_moe import get_default_config

    return get_default_config(tokens, shape.experts, shape.n, shape.d, shape.k, None)


def tuned_configs(shape: Shape, folder: Path | None) -> dict[int, dict[str, int]]:
    """vLLM's tuned tiles of `folder`, or those that vLLM ships; empty if there are none."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    name = fused_moe.get_config_file_name(shape.experts, shape.n, None)
    for place in filter(None, (folder, Path(fused_moe.__file__).with_name("configs"))):
        if (place / name).exists():
            return {int(k): v for k, v in json.loads((place / name).read_text()).items() if k.isdigit()}
    return {}


def run(
    names: list[str],
    tokens: list[int],
    tuned: Path | None = None,
    on_row: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Rows of every shape and number of tokens, also given to `on_row` after each one.

    Args:
        names: keys of `SHAPES`.
        tuned: folder of `vllm-ext moe tune`, for vLLM's tuned row and for tables of tiles beyond the package's.

    Raises:
        ConfigError: unknown shape, no CUDA.
    """
    import torch

    for name in names:
        if name not in SHAPES:
            raise ConfigError(f"--shape '{name}' is unknown{did_you_mean(name, list(SHAPES))}")
    if not torch.cuda.is_available():
        raise ConfigError("bench moe needs a CUDA device; run it there.")
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    rows: list[dict[str, Any]] = []
    for name in names:
        layer = make_layer(SHAPES[name])
        for count in tokens:
            rows.append({"shape": name} | _row(layer, count, tuned, bandwidth, rate))
            on_row(rows)
        del layer
        torch.cuda.empty_cache()
    return rows


def _row(layer: Layer, tokens: int, tuned: Path | None, bandwidth: float, rate: float) -> dict[str, Any]:
    """Times of one layer call in seconds, and the error of ours beside vLLM's."""
    import torch

    from vllm_ext.kernels.sonic_moe import default_tiles
    from vllm_ext.moe.sonic_table import file_name, find

    shape, calls = layer.shape, layer.calls(tokens, routings(tokens))
    device = torch.cuda.get_device_name(0)
    file = tuned / file_name(shape, device) if tuned else None
    table = find(shape, device, str(file) if file and file.exists() else None)
    tiles = table.tiles(tokens) if table.rows else default_tiles(tokens * shape.k / shape.experts)
    configs = tuned_configs(shape, tuned)
    bytes_s, flops_s = floor(shape, calls, bandwidth, rate)
    default, ours = stock(layer, calls, default_config(shape, tokens)), sonic(layer, calls, tiles)
    want, got = default()[0].float(), ours()[0].float()
    row: dict[str, Any] = {
        "tokens": tokens,
        "default_s": measure(default, len(calls)),
        "sonic_s": measure(ours, len(calls)),
        "bytes_floor_s": bytes_s,
        "flops_floor_s": flops_s,
        "bandwidth": bandwidth,
        "matmul_rate": rate,
        "tiles": tiles.as_dict(),
        "served": table.covers(tokens),
        "error": float((got - want).norm() / want.norm()),
    }
    if configs:
        nearest = configs[min(configs, key=lambda at: abs(at - tokens))]
        row |= {"tuned_s": measure(stock(layer, calls, nearest), len(calls)), "tuned": nearest}
    return row


def table(rows: list[dict[str, Any]]) -> Any:
    """The rows as a rich table."""
    from rich.table import Table

    out = Table(title="one expert layer, bf16, us a call")
    for head in (
        "shape",
        "tokens",
        "vLLM default",
        "vLLM tuned",
        "sonic",
        "tuned / sonic",
        "floor",
        "of the floor",
        "",
    ):
        out.add_column(head, justify="left" if head in ("shape", "") else "right")
    for r in rows:
        least = max(r["bytes_floor_s"], r["flops_floor_s"])
        best = r.get("tuned_s", r["default_s"])
        out.add_row(
            r["shape"], str(r["tokens"]), f"{1e6 * r['default_s']:.1f}",
            f"{1e6 * r['tuned_s']:.1f}" if "tuned_s" in r else "–", f"{1e6 * r['sonic_s']:.1f}",
            f"{best / r['sonic_s']:.2f}x", f"{1e6 * least:.1f}", f"{least / r['sonic_s']:.0%}",
            "" if r["served"] else "left to vLLM",
        )  # fmt: skip
    return out
