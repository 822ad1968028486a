"""ReST-KV: keep what the layer's output could not be rebuilt without (An et al., ICLR 2026)."""

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
class ReSTKV(KVMethod):
    """Score: `a / (1 - a) * ||(o - v) W_O||^tau` with attention smoothed over the window, pooled along its drift.

    The published code keeps a set per query head. A KV cache holds one per KV head, so scores are reduced over the GQA
    group (this package's choice).
    """

    name: ClassVar[str] = "rest_kv"
    needs_output_weight: ClassVar[bool] = True
    paper_values: ClassVar[Mapping[str, Any]] = {"sinks": 0}

    alpha: float = option(0.3, "weight of the newest query in the moving average", minimum=0, maximum=1)
    beta: float = option(2000.0, "tokens of drift for one step of pooling width and shift", unit="tokens", minimum=1)
    tau: float = option(1.0, "power of the reconstruction error", minimum=0)
    drift: str = option(
        "centroid", "how the attention's drift is measured: by centroids, or by ranks (the paper; sorts every query)",
        choices=("centroid", "rank"), paper="rank",
    )  # fmt: skip
    group: str = option("mean", "how the scores of a GQA group's query heads combine", choices=("mean", "max"))

    def score(self, view: KVView) -> Tensor:
        import torch

        from vllm_ext.kernels import kv_score_rest as formula

        window = view.queries.shape[1]
        past = view.n - window
        smooth = view.attention_heads(formula.moving_average(window, self.alpha).to(view.keys.device))[..., :past]
        raw = [
            formula.reconstruction(smooth[i], view.values[i, :, :past], view.output_gram(i), self.tau)
            for i in range(len(view.layers))
        ]
        pooled = formula.adaptive_pool(torch.stack(raw), self._drift(view, past), self.beta)
        by_group = pooled.unflatten(1, (view.heads, -1))
        scores = by_group.mean(2) if self.group == "mean" else by_group.amax(2)
        return torch.nn.functional.pad(scores, (0, window))

    def _drift(self, view: KVView, past: int) -> Tensor:
        """[L, Hq] tokens."""
        import torch

        from vllm_ext.kernels import kv_score_rest as formula

        window = view.queries.shape[1]
        if self.drift == "rank":
            return formula.rank_drift(view.attention()[..., :past], max(1, min(past, view.budget - window)))
        half = torch.zeros(2, window, device=view.keys.device)
        half[0, : window // 2] = half[1, window // 2 : 2 * (window // 2)] = 1 / max(1, window // 2)
        early, late = (view.attention_heads(h)[..., :past] for h in half)
        return formula.centroid_drift(early, late)
