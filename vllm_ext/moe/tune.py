"""Search vLLM's own tile configuration of an expert layer, and write it where vLLM looks for it.

vLLM's Triton experts read `E=..,N=..,device_name=...json`: number of tokens -> tiles of both GEMMs. The search starts
from vLLM's default and from what won for other shapes in the files that vLLM ships for this device, then changes one
field of the best at a time until nothing gets faster or the time for this number of tokens is spent.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_ext import records
from vllm_ext.bench import moe
from vllm_ext.bench.compile_pool import CompilePool, compile_only
from vllm_ext.moe.shape import ELEMENT, SHAPES, Shape, cut, from_config
from vllm_ext.options import ConfigError

TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 8192, 16384)
"""The numbers of tokens of vLLM's own files, and two larger chunks; vLLM takes the nearest."""
FIELDS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
STEPS: dict[str, tuple[int, ...]] = {
    "BLOCK_SIZE_M": (16, 32, 64, 128),
    "BLOCK_SIZE_N": (32, 64, 128, 256),
    "BLOCK_SIZE_K": (64, 128, 256),
    "GROUP_SIZE_M": (1, 16, 32, 64),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
}
SHARED = 232448
"""Bytes of shared memory that a block of an H100 can have; smaller devices refuse a configuration when it is tried."""

Config = dict[str, int]


def file_name(shape: Shape) -> str:
    """The name that vLLM looks for, unquantized."""
    from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name

    return get_config_file_name(shape.experts, shape.n, None)


def shipped(tokens: int, most: int) -> list[Config]:
    """The configurations that won most often at about `tokens` in vLLM's files of this device, best first."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    device = fused_moe.get_config_file_name(1, 1, None).split("device_name=")[1]
    files = sorted((Path(fused_moe.__file__).parent / "configs").glob(f"*device_name={device}"))
    won: Counter[tuple[int, ...]] = Counter()
    for file in files:
        table = {int(k): v for k, v in json.loads(file.read_text()).items() if k.isdigit()}
        best = table[min(table, key=lambda at: abs(at - tokens))]
        won[tuple(best[f] for f in FIELDS)] += 1
    return [dict(zip(FIELDS, values)) for values, _ in won.most_common(most)]


def seeds(shape: Shape, tokens: int) -> list[Config]:
    """Where the search starts: vLLM's default first."""
    default = {f: moe.default_config(shape, tokens)[f] for f in FIELDS}
    found = [default, *shipped(tokens, 8)]
    if tokens >= 1024:
        found += [default | {"BLOCK_SIZE_N": 256, "num_stages": 4, "GROUP_SIZE_M": g} for g in (1, 16)]
    return [c for i, c in enumerate(found) if c not in found[:i] and fits(c)]


def fits(config: Config) -> bool:
    """Whether the pipeline fits into shared memory, and a warp has work."""
    m, n, k = (config[f] for f in FIELDS[:3])
    return (m + n) * k * ELEMENT * config["num_stages"] <= SHARED and m * n >= 128 * config["num_warps"]


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations with one field moved by one step."""
    for field, values in STEPS.items():
        at = values.index(config[field]) if config[field] in values else 0
        for i in (at - 1, at + 1):
            if 0 <= i < len(values) and fits(moved := config | {field: values[i]}):
                yield moved


def compile_stock(shape: Shape, tokens: int, config: Config) -> None:
    """Compile both GEMMs of vLLM's experts for a configuration."""
    import torch
    from vllm.model_executor.layers.fused_moe import fused_moe
    from vllm.triton_utils import tl

    def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    pairs, block = tokens * shape.k, config["BLOCK_SIZE_M"]
    ids = None
    if pairs * 4 > shape.experts:  # else vLLM does not sort
        padded = pairs + shape.experts * (block - 1)
        ids = meta(min(pairs * block, padded) if pairs < shape.experts else padded, dtype=torch.int32)
    one, blocks = meta(1, dtype=torch.int32), meta(1 + pairs, dtype=torch.int32)
    weights = meta(tokens, shape.k, dtype=torch.float32)
    rows, w13 = meta(tokens, shape.d), meta(shape.experts, 2 * shape.n, shape.d)
    inner, w2 = meta(pairs, shape.n), meta(shape.experts, shape.d, shape.n)
    quantized = ("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant")
    off = dict.fromkeys(quantized, False)
    with compile_only(fused_moe.fused_moe_kernel):
        for a, b, width, scaled, k in ((rows, w13, 2 * shape.n, False, shape.k), (inner, w2, shape.d, True, 1)):
            c = meta(tokens, shape.k, width)
            fused_moe.invoke_fused_moe_triton_kernel(
                a, b, c, None, None, weights, ids, blocks, one, scaled, k, config, compute_type=tl.bfloat16, **off
            )


@dataclass
class Found:
    """Best configuration for a number of tokens; times in seconds a layer."""

    tokens: int
    config: Config
    time_s: float
    default_s: float
    tried: int


def search(layer: moe.Layer, tokens: int, pool: CompilePool, seconds: float) -> Found:
    """The best configuration found for `tokens` within about `seconds`."""
    end = time.monotonic() + seconds
    calls = layer.calls(tokens, moe.routings(tokens))
    times: dict[str, tuple[float, Config]] = {}

    def trial(configs: list[Config]) -> None:
        new = [c for c in configs if str(c) not in times]
        for config in new:
            pool.submit(compile_stock, layer.shape, tokens, config)
        pool.wait()
        for config in new:
            if times and time.monotonic() > end:
                return
            times[str(config)] = (time_of(layer, calls, config), config)

    trial(seeds(layer.shape, tokens))
    default = next(iter(times.values()))[0]
    best, config = min(times.values(), key=lambda x: x[0])
    while time.monotonic() < end:
        trial(list(neighbours(config)))
        better, config = min(times.values(), key=lambda x: x[0])
        if better >= best * 0.995:
            break
        best = better
    best, config = min(times.values(), key=lambda x: x[0])
    return Found(tokens, config, best, default, len(times))


def time_of(layer: moe.Layer, calls: list[Any], config: Config) -> float:
    """Seconds of a call; infinite if the device cannot run the configuration."""
    from triton.runtime.errors import OutOfResources
    from vllm.model_executor.layers import fused_moe

    try:
        return moe.measure(moe.stock(layer, calls, config), len(calls), 0.02)
    except OutOfResources:
        fused_moe._config = None  # override_config does not take its value back after an error
        return float("inf")


@dataclass
class Result:
    """Files and rows of a run; `sonic` rows only where they were asked for."""

    path: Path
    rows: list[dict[str, Any]]
    sonic_path: Path | None = None


Progress = Callable[[str, int, int], None]


def tune(
    shape: Shape,
    tokens: list[int] | None,
    folder: Path,
    seconds: float,
    sonic: bool,
    progress: Progress,
    wide: bool = False,
) -> Result:
    """Tune every number of tokens that `folder` has no result for; the files are complete after each one.

    Args:
        tokens: None = `TOKENS`.
        seconds: of the search for one number of tokens.
        sonic: also search the tiles of the SonicMoE kernels.
        progress: called with (what, done, total).
        wide: search more of those tiles.

    Raises:
        ConfigError: no CUDA device.
    """
    from vllm.model_executor.layers.fused_moe import fused_experts  # noqa: F401  before the pool is forked
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        raise ConfigError("moe tune measures kernels and needs a CUDA device; run it on the machine that will serve.")
    pool = CompilePool()
    tokens = tokens or list(TOKENS)
    path = folder / file_name(shape)
    rows = _previous(path)
    todo = [t for t in tokens if t not in {r["tokens"] for r in rows}]
    for t in todo:
        for config in seeds(shape, t):
            pool.submit(compile_stock, shape, t, config)
    layer = moe.make_layer(shape)
    for done, t in enumerate(todo):
        progress("vLLM's tiles", done, len(todo))
        rows = sorted([*rows, vars(search(layer, t, pool, seconds))], key=lambda r: r["tokens"])
        _save(path, shape, rows)
        progress("vLLM's tiles", done + 1, len(todo))
    sonic_path = None
    if sonic:
        from vllm_ext.moe import sonic_tune

        sonic_path = sonic_tune.tune(layer, rows, pool, folder, progress, wide)
    pool.close()
    return Result(path, rows, sonic_path)


def _save(path: Path, shape: Shape, rows: list[dict[str, Any]]) -> None:
    """vLLM's file, and the record beside it."""
    import triton

    table = {str(r["tokens"]): r["config"] | {"SPLIT_K": 1} for r in rows}
    records.save({"triton_version": triton.__version__, **table}, path)
    records.save(records.record("moe tune", rows, shape=asdict(shape)), _record(path))


def read_shape(model: str, tensor_parallel: int = 1, expert_parallel: int = 1) -> Shape:
    """The expert layer of a rank, from a name of `SHAPES` or a model directory.

    Raises:
        ConfigError: no such model, not an MoE model, quantized experts, or ranks that do not divide it.
    """
    for option, ranks in (("tensor", tensor_parallel), ("expert", expert_parallel)):
        if ranks < 1:
            raise ConfigError(f"--{option}-parallel must be at least 1, got {ranks}.")
    if model in SHAPES:
        config: dict[str, Any] = {}
        shape = cut(SHAPES[model], tensor_parallel)
    else:
        try:
            config = json.loads((Path(model).expanduser() / "config.json").read_text())
        except (OSError, ValueError):
            raise ConfigError(
                f"'{model}' is neither a directory with config.json nor one of {', '.join(SHAPES)}; give one of them."
            ) from None
        config = config.get("text_config", config)
        shape = from_config(config, tensor_parallel)
    if "quantization_config" in config:
        raise ConfigError("moe tune searches tiles of bfloat16 and float16 experts, and this model is quantized.")
    if shape.experts % expert_parallel:
        raise ConfigError(
            f"--expert-parallel {expert_parallel} does not divide {shape.experts} experts; choose a divisor."
        )
    return replace(shape, experts=shape.experts // expert_parallel)


def report(result: Result) -> Any:
    """Gains as a rich table."""
    from rich.table import Table

    out = Table(title="vLLM's Triton experts, us a call")
    for head in ("tokens", "default", "tuned", "gain", "tiles M x N x K, group, warps, stages", "tried"):
        out.add_column(head, justify="right")
    for r in result.rows:
        m, n, k, *rest = (r["config"][f] for f in FIELDS)
        tiles = f"{m} x {n} x {k}, {', '.join(map(str, rest))}"
        times = f"{1e6 * r['default_s']:.1f}", f"{1e6 * r['time_s']:.1f}", f"{r['default_s'] / r['time_s']:.2f}x"
        out.add_row(str(r["tokens"]), *times, tiles, str(r["tried"]))
    return out


def _record(path: Path) -> Path:
    """Where the measurements beside vLLM's file lie."""
    return path.with_name(path.name.removesuffix(".json") + ".record.json")


def _previous(path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier run on this device with this Triton; none if it was another."""
    try:
        record = json.loads(_record(path).read_text())
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    import triton

    same = known.get("triton_version") == triton.__version__ and record["device"] == records.device_name()
    return record["results"] if same else []
