"""A frozen Hugging Face causal LM whose attention can be watched or replaced, layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_ext.attention_backends.rope import ModelShape, model_shape
from vllm_ext.options import ConfigError

NAME = "vllm_ext_watched"
"""The attention implementation's name in transformers' registry."""

Watcher = Callable[[int, Tensor, Tensor, Tensor, float], Tensor | None]
"""(layer, q [B, Hq, m, D], k [B, H, n, D], v [B, H, n, D], scale), rotary applied -> output [B, Hq, m, D], or None."""

_watcher: Watcher | None = None


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of the last m of n tokens: q [B, Hq, m, D], k and v [B, H, n, D] -> [B, Hq, m, D]."""
    m, n = q.shape[2], k.shape[2]
    mask = None
    if 1 < m < n:
        mask = torch.arange(n, device=q.device) <= torch.arange(n - m, n, device=q.device)[:, None]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=m == n and m > 1, scale=scale, enable_gqa=True)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    out = _watcher(module.layer_idx, query, key, value, scaling) if _watcher else None
    if out is None:
        out = dense(query, key, value, scaling)
    return out.transpose(1, 2), None


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Call `watcher` in every attention layer; what it returns replaces the layer's output."""
    global _watcher
    _watcher = watcher
    try:
        yield
    finally:
        _watcher = None


@dataclass
class Frozen:
    """The model: `body` gives hidden states, `shape` what files trained for it must agree with."""

    body: Any
    tokenizer: Any
    shape: ModelShape
    device: torch.device
    dtype: torch.dtype
    name: str


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is CUDA where there is one.

    Raises:
        ConfigError: no such device here.
    """
    cuda = torch.cuda.is_available()
    if name != "auto" and name.split(":")[0] not in (("cuda", "cpu") if cuda else ("cpu",)):
        raise ConfigError(f"--device {name} is not available here; use auto{', cuda' if cuda else ''} or cpu.")
    return torch.device(("cuda" if cuda else "cpu") if name == "auto" else name)


def load(model: str | Path, device: str = "auto", dtype: str = "auto", tokenizer: Any = None) -> Frozen:
    """Load a model directory, without gradients on its weights.

    Args:
        dtype: "auto" is bfloat16 on CUDA and float32 on CPUs.
        tokenizer: instead of the directory's own.

    Raises:
        ConfigError: no such directory, or attention that cannot be watched.
    """
    from transformers import AttentionInterface, AutoConfig, AutoModel, AutoTokenizer

    path, place = Path(model), pick_device(device)
    if not (path / "config.json").is_file():
        raise ConfigError(f"--model {model} is no model directory (no config.json in it).")
    AttentionInterface.register(NAME, _attention)
    shape = model_shape(AutoConfig.from_pretrained(path))
    auto = torch.bfloat16 if place.type == "cuda" else torch.float32
    kind = auto if dtype == "auto" else getattr(torch, dtype)
    body = AutoModel.from_pretrained(path, dtype=kind, attn_implementation=NAME).to(place).eval()
    body.requires_grad_(False)
    if not hasattr(body, "rotary_emb") or getattr(body.config, "sliding_window", None):
        raise ConfigError(
            f"--model {model} ({body.config.model_type}) has no plain full attention with rotary positions."
        )
    return Frozen(body, tokenizer or AutoTokenizer.from_pretrained(path), shape, place, kind, path.name)
