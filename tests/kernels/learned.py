"""Random gates and roles as files, for models that exist only by their shape."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from vllm_ext.attention_backends import gate_file, role_file
from vllm_ext.attention_backends.rope import ModelShape

ROPE = {"kind": "default", "theta": 10000.0, "share": 1.0}


@lru_cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="vllm-ext-test-")


def random_gates(model: ModelShape, width: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Gates of every layer, of the size that training leaves."""
    gen = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(model.layers):
        sizes = gate_file.shapes(model, width)
        layer = {part: torch.randn(sizes[part], generator=gen) / sizes[part][-2] ** 0.5 for part in ("q", "k")}
        made.append(layer | {p: 1 + 0.1 * torch.randn(width, generator=gen) for p in ("q_norm", "k_norm")})
    return made


@lru_cache
def gates(layers: int, kv_heads: int, group: int, size: int, width: int, page: int, share: float = 1.0) -> str:
    """Path of a file with random gates."""
    model = ModelShape(layers, kv_heads * group, kv_heads, size, ROPE | {"share": share})
    path = Path(_folder().name) / f"gates-{layers}-{kv_heads}-{group}-{size}-{width}-{page}-{share}.safetensors"
    gate_file.write(path, random_gates(model, width), model, page)
    return str(path)


@lru_cache
def roles(layers: int, kv_heads: int, group: int, size: int, every: int = 3) -> str:
    """Path of a file in which one of `every` heads behind the first layer is a retrieval head."""
    model = ModelShape(layers, kv_heads * group, kv_heads, size, ROPE)
    path = Path(_folder().name) / f"roles-{layers}-{kv_heads}-{group}-{size}-{every}.json"
    chosen = [[i == 0 or (i * kv_heads + h) % every == 0 for h in range(kv_heads)] for i in range(layers)]
    score = [[0.9 if x else 0.1 for x in row] for row in chosen]
    role_file.write(path, chosen, score, model)
    return str(path)
