"""Sink and recent tokens only (StreamingLLM, Xiao et al., ICLR 2024), positions kept: floor of the quality tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vllm_ext.attention_backends.method import SparseMethod


@dataclass(frozen=True)
class Streaming(SparseMethod):
    """Reads the `sink` first pages and fills the rest of `budget` with the most recent ones. KV is not freed."""

    name: ClassVar[str] = "streaming"
    score: ClassVar[Literal["recency"]] = "recency"
    paper_values: ClassVar[Mapping[str, Any]] = {"sink": "4 tokens", "dense_layers": []}
