"""Quest: read the pages whose keys can have the largest logit (Tang et al., ICML 2024, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vllm_ext.attention_backends.method import SparseMethod
from vllm_ext.options import option


@dataclass(frozen=True)
class Quest(SparseMethod):
    """Score of a page: `sum_c max(q_c * min_c, q_c * max_c)`, an upper bound of every logit in the page.

    That is `q . centre + |q| . half_range` of the box around the page's keys. The box grows with the page, and with it
    the bound's noise; `radius` below 1 takes only that share of the half-range and is no bound (not in the paper).

    `min` and `max` are taken channel by channel over the page's keys. The query heads of a GQA group share one
    list, so their bounds are combined by `group`; the paper has one KV head per query head and needs no such choice.
    """

    name: ClassVar[str] = "quest"
    index: ClassVar[Literal["minmax"]] = "minmax"
    score: ClassVar[Literal["bound"]] = "bound"
    paper_values: ClassVar[Mapping[str, Any]] = {"page_size": 16}

    group: str = option(
        "max", "how the bounds of a GQA group's query heads combine", choices=("max", "mean", "softmax")
    )
    radius: float = option(1.0, "share of the half-range of a page's keys in its score", minimum=0, maximum=1)
