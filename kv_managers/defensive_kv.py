"""DefensiveKV: keep what could matter in the worst case (Feng et al., ICLR 2026)."""

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
class DefensiveKV(KVMethod):
    """Score: largest attention over window and GQA group, at least the head's mean, times the value's norm.

    Before that, the fewest tokens whose mean attention reaches `mass` are kept (CriticalKV's first stage). Every head
    keeps equally many tokens; the paper also moves budget between the heads of a layer, which frees no vLLM blocks.
    """

    name: ClassVar[str] = "defensive_kv"
    needs_output_weight: ClassVar[bool] = True
    paper_values: ClassVar[Mapping[str, Any]] = {"sinks": 0}

    pool: int = option(5, "tokens of the average pooling", unit="tokens", choices=(1, 3, 5, 7, 9, 13))
    norm: str = option(
        "l2",
        "norm of a value behind the output projection; l1 costs a product with it",
        choices=("l1", "l2"),
        paper="l1",
    )
    norm_over: str = option(
        "tokens", "what norms are divided by the sum over: tokens (the paper's text) or heads (its code)",
        choices=("tokens", "heads"),
    )  # fmt: skip
    mass: float = option(0.9, "share of the attention that the first stage covers", minimum=0, maximum=1)

    def keeps_grams(self) -> bool:
        return self.norm == "l2"

    def score(self, view: KVView) -> Tensor:
        import torch

        from vllm_ext.kernels import kv_score_defensive as formula

        past = view.n - view.queries.shape[1]
        output = view.output_weight if self.norm == "l1" else view.output_gram
        norms = [formula.value_norms(view.values[i, :, :past], output(i), self.norm) for i in range(len(view.layers))]
        room = max(0, view.budget - max(0, view.chosen - past))
        first = formula.first_stage(view.attention_mean(), past, room, self.mass)
        worst = view.attention_max(self.pool, past)
        scores = formula.defensive_scores(worst, torch.stack(norms), first, self.norm_over)
        return torch.nn.functional.pad(scores, (0, view.n - past))
