"""Oracle: read the pages with the largest exact attention mass. For quality tables only: choosing reads every key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vllm_ext.attention_backends.method import SparseMethod


@dataclass(frozen=True)
class OracleTopK(SparseMethod):
    """Score of a page: its softmax mass, summed over the query heads of the GQA group. Never faster than dense."""

    name: ClassVar[str] = "oracle_topk"
    score: ClassVar[Literal["exact"]] = "exact"
    group: ClassVar[str] = "softmax"
