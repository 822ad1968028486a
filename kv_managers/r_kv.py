"""R-KV: attention of the last queries, less what other tokens say as well (Cai et al., 2025, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vllm_ext.kv_managers.method import KVMethod, Trigger
from vllm_ext.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_ext.kv_managers.view import KVView


@dataclass(frozen=True)
class RKV(KVMethod):
    """Score: `mix * importance - (1 - mix) * redundancy`.

    importance: attention of the window, mean over window and GQA group, max-pooled over tokens. redundancy: softmax
        over the tokens of their mean cosine to the others, where a token's `recent` newest near-duplicates (cosine
        above `threshold`) do not count, so that the newest of a repeated group stays.
    """

    name: ClassVar[str] = "r_kv"
    batched: ClassVar[bool] = True
    trigger: ClassVar[Trigger] = "decode"

    budget: int | None = option(1024, "tokens kept per KV head", unit="tokens", minimum=16)
    window: int = option(8, "last queries that score, and last tokens that always stay", unit="tokens", minimum=1)
    sinks: int = option(0, "first tokens that always stay", unit="tokens", minimum=0)
    stride: int = option(128, "generated tokens between evictions", unit="tokens", minimum=16)
    mix: float = option(0.1, "weight of importance against redundancy", minimum=0, maximum=1)
    pool: int = option(7, "tokens of the max pooling", unit="tokens", choices=(1, 3, 5, 7, 9))
    threshold: float = option(0.5, "cosine from which two keys count as the same", minimum=-1, maximum=1)
    recent: int = option(1, "newest near-duplicates of a token that do not count as redundant", choices=(0, 1))

    def score(self, view: KVView) -> Tensor:
        from vllm_ext.kernels.kv_reference import max_pool

        importance = max_pool(view.attention_mean(), self.pool)
        return self.mix * importance - (1 - self.mix) * view.redundancy(self.threshold, self.recent)
