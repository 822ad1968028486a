"""Router kernels beside vLLM's softmax top-k and beside the same formula in PyTorch. CUDA only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from vllm_ext.bench.moe import measure
from vllm_ext.options import ConfigError

SHAPES = ((64, 8), (128, 8))
"""Experts and experts a token: OLMoE, Qwen3-30B-A3B."""
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
COPIES = 8
"""Inputs that a timed graph walks over."""


def run(shapes: Sequence[tuple[int, int]] = SHAPES, tokens: Sequence[int] = TOKENS) -> list[dict[str, Any]]:
    """Seconds a call, as medians of CUDA graph replays, on bfloat16 logits.

    Raises:
        ConfigError: no CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("router kernels are timed on a GPU; run this where CUDA is.")
    return [_row(experts, top_k, count) for experts, top_k in shapes for count in tokens]


def _row(experts: int, top_k: int, tokens: int) -> dict[str, Any]:
    import torch
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk

    from vllm_ext.kernels import reference_routing, route_topk

    generator = torch.Generator("cuda").manual_seed(0)
    logits = [torch.randn(tokens, experts, generator=generator, device="cuda").bfloat16() for _ in range(COPIES)]
    calls: dict[str, Callable[[Any], Any]] = {
        "vllm_softmax": lambda x: fused_topk(x, x, top_k, True),
        "kern": lambda x: route_topk.kern(x, top_k),
        "dirmoe": lambda x: route_topk.dirmoe(x, top_k, 1.0, None, 0.0, 9.0),
        "kern_torch": lambda x: reference_routing.kern(x, top_k),
        "dirmoe_torch": lambda x: reference_routing.dirmoe(x, top_k, 1.0, 9.0, 1.0),
        "token_rounding_torch": lambda x: reference_routing.token_rounding(x, top_k, True, 128),
    }
    times = {name: measure(partial(_walk, call, logits), COPIES) for name, call in calls.items()}
    return {"experts": experts, "top_k": top_k, "tokens": tokens, "seconds": times}


def _walk(call: Callable[[Any], Any], inputs: list[Any]) -> list[Any]:
    return [call(x) for x in inputs]


def table(rows: list[dict[str, Any]]) -> Any:
    """A rich table, microseconds."""
    from rich.table import Table

    out = Table(title="routers, microseconds a call")
    names = list(rows[0]["seconds"]) if rows else []
    for name in ("experts", "a token", "tokens", *names):
        out.add_column(name, justify="right")
    for row in rows:
        times = (f"{row['seconds'][n] * 1e6:.1f}" for n in names)
        out.add_row(str(row["experts"]), str(row["top_k"]), str(row["tokens"]), *times)
    return out
