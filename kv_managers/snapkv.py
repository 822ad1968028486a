"""SnapKV: keep the prompt tokens that its last queries attend to (Li et al., NeurIPS 2024, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_ext.kv_managers.method import KVMethod
from vllm_ext.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_ext.kv_managers.view import KVView


@dataclass(frozen=True)
class SnapKV(KVMethod):
    """Score: attention of the last `window` queries, averaged over them and the GQA group, average-pooled over tokens.

    The paper has one KV head per query head; the mean over the group is this implementation's choice.
    """

    name: ClassVar[str] = "snapkv"
    batched: ClassVar[bool] = True
    paper_values: ClassVar[Mapping[str, Any]] = {"window": 16, "sinks": 0}

    pool: int = option(5, "tokens of the average pooling", unit="tokens", minimum=1, choices=(1, 3, 5, 7, 9, 13))

    def score(self, view: KVView) -> Tensor:
        from vllm_ext.kernels.kv_reference import average_pool

        return average_pool(view.attention_mean(), self.pool)
