"""StreamingLLM with freed memory: the first tokens and the newest ones stay (Xiao et al., ICLR 2024, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vllm_ext.kv_managers.method import KVMethod, Trigger
from vllm_ext.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_ext.kv_managers.view import KVView


@dataclass(frozen=True)
class StreamingLLM(KVMethod):
    """Score: the position. Keys keep the position they were computed at; the paper re-numbers them in the cache."""

    name: ClassVar[str] = "streaming_llm"
    trigger: ClassVar[Trigger] = "streaming"
    needs_queries: ClassVar[bool] = False

    budget: int | None = option(1024, "tokens kept per KV head", unit="tokens", minimum=16)

    def score(self, view: KVView) -> Tensor:
        import torch

        order = torch.arange(view.n, dtype=torch.float32, device=view.device)
        return order.expand(len(view.layers), view.heads, view.n)
