"""Sink and recent tokens only (StreamingLLM, Xiao et al., ICLR 2024), positions kept: floor of the quality tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vllm_ext.attention_backends.method import SparseMethod


@dataclass(frozen=True)
class Streaming(SparseMethod):
    """Reads the `sink` first pages and fills the rest of `budget` with the most recent ones. KV is not freed."""

    name: ClassVar[str] = "streaming"
    score: ClassVar[Literal["recency"]] = "recency"
    group: ClassVar[str] = "max"
