"""Random tokens stay: the floor of the quality tables. No paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vllm_ext.kv_managers.method import KVMethod
from vllm_ext.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_ext.kv_managers.view import KVView


@dataclass(frozen=True)
class RandomKV(KVMethod):
    """Score: uniform noise, the same for the same layer, length and `seed`."""

    name: ClassVar[str] = "random_kv"
    needs_queries: ClassVar[bool] = False

    seed: int = option(0, "of the noise", minimum=0)

    def score(self, view: KVView) -> Tensor:
        import torch

        noise = []
        for layer in view.layers:
            generator = torch.Generator().manual_seed((self.seed * 1009 + layer) * 1_000_003 + view.seen)
            noise.append(torch.rand(view.heads, view.n, generator=generator))
        return torch.stack(noise).to(view.device)
