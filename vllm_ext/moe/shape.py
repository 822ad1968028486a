"""The sizes of an expert layer on one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_ext.options import ConfigError

ELEMENT = 2
"""Bytes of a weight or activation (bf16, fp16)."""


@dataclass(frozen=True)
class Shape:
    """E experts, k a token, hidden size d, width n of an expert on this rank."""

    experts: int
    k: int
    d: int
    n: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of the weights of one expert."""
        return ELEMENT * 3 * self.n * self.d

    def flops(self, tokens: int) -> int:
        """FLOPs of the three projections of every routed pair."""
        return 6 * tokens * self.k * self.n * self.d

    def __str__(self) -> str:
        return f"E={self.experts},K={self.k},D={self.d},N={self.n}"


SHAPES = {
    "olmoe-1b-7b": Shape(64, 8, 2048, 1024),
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "mixtral-8x7b": Shape(8, 2, 4096, 14336),
}
"""Layers of public models."""


def from_config(config: Any, tensor_parallel: int = 1) -> Shape:
    """The shape from a model's configuration (object or mapping), its experts cut into `tensor_parallel` parts.

    Raises:
        ConfigError: no MoE model, or experts that cannot be cut so.
    """

    def first(*names: str) -> int:
        for name in names:
            value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
            if isinstance(value, int) and value > 0:
                return value
        raise ConfigError(f"the model's config.json has no {' or '.join(names)}; give a mixture-of-experts model.")

    experts = first("num_experts", "num_local_experts", "n_routed_experts")
    k = first("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
    n = first("moe_intermediate_size", "intermediate_size")
    return cut(Shape(experts, k, first("hidden_size"), n), tensor_parallel)


def cut(shape: Shape, tensor_parallel: int) -> Shape:
    """The part of every expert that one of `tensor_parallel` ranks has.

    Raises:
        ConfigError: the width cannot be cut so.
    """
    if shape.n % tensor_parallel:
        raise ConfigError(
            f"experts of width {shape.n} cannot be cut into {tensor_parallel} parts; choose a divisor of {shape.n}."
        )
    return replace(shape, n=shape.n // tensor_parallel)
