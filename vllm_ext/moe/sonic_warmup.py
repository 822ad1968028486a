"""Compile the SonicMoE kernels without running them, on tensors without memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from vllm_ext.bench.compile_pool import compile_only
from vllm_ext.kernels import moe_route, sonic_moe
from vllm_ext.kernels.sonic_moe import Tiles
from vllm_ext.moe.shape import Shape

if TYPE_CHECKING:
    from vllm_ext.moe.sonic import SonicExperts


def compile_call(
    shape: Shape, tokens: int, tiles: Tiles, dtype: torch.dtype = torch.bfloat16, expert_map: bool = False
) -> None:
    """Compile what a call of `tokens` tokens launches."""

    def meta(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    ids = meta(tokens, shape.k, dtype=torch.int32)
    w13, w2 = meta(shape.experts, 2 * shape.n, shape.d), meta(shape.experts, shape.d, shape.n)
    kernels = sonic_moe._up, sonic_moe._down, sonic_moe._combine, moe_route._count, moe_route._place
    with compile_only(*kernels):
        sonic_moe.sonic_moe(
            meta(tokens, shape.d), w13, w2, meta(tokens, shape.k, dtype=torch.float32), ids, tiles,
            expert_map=meta(shape.experts, dtype=torch.int32) if expert_map else None,
        )  # fmt: skip


def compile_kernels(kernel: SonicExperts, layer: Any) -> None:
    """Compile every variant that the calls of a layer (`layers.Runner`) can need."""
    most, weights = layer.facts.max_tokens, layer.routed_experts.w13_weight
    shape = replace(kernel.shape, experts=weights.shape[0])
    rows = {r.tokens * kernel.ranks for r in kernel.table.rows}
    sizes = {most, *(r for r in rows if r < most), *(2**i for i in range(most.bit_length()))}
    for size in sorted(s for s in sizes if kernel.covers(s)):
        mapped = layer.routed_experts.expert_map is not None
        compile_call(shape, size, kernel.tiles(size), weights.dtype, mapped)
