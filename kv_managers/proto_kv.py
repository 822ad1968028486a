"""ProtoKV: keep or evict clusters of tokens around prototypes (ICLR 2026)."""

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
class ProtoKV(KVMethod):
    """Score: the token's cluster by what the window sees of it; the last cluster that fits is cut by attention.

    Anchors (tokens unlike their neighbours) get prototypes by random hashing, the others by even chunks. The paper
    sums raw logits over a cluster, which favours large ones; the default here is the mean attention probability.
    """

    name: ClassVar[str] = "proto_kv"
    paper_values: ClassVar[Mapping[str, Any]] = {"sinks": 0}

    reach: int = option(5, "neighbours on each side that a token is compared with", unit="tokens", minimum=1)
    anchors: int = option(32, "most deviating tokens, which get prototypes of their own", unit="tokens", minimum=0)
    bits: int = option(2, "bits of the hash: 2^bits prototypes for the anchors", minimum=1, maximum=4)
    chunks: int = option(500, "prototypes for the other tokens", minimum=1)
    reducer: str = option(
        "mean", "worth of a cluster: mean attention, or the sum of logits", choices=("mean", "logits"), paper="logits"
    )

    def score(self, view: KVView) -> Tensor:
        import torch

        from vllm_ext.kernels import kv_score_proto as formula

        past = view.n - view.queries.shape[1]
        attention = view.attention_mean()[..., :past].float()
        found = []
        for i in range(len(view.layers)):
            keys = view.keys[i, :, :past]
            proto, exists = formula.prototypes(keys, self.anchors, self.bits, self.chunks, self.reach)
            cluster = formula.assign(keys, proto, exists)
            worth = attention[i] if self.reducer == "mean" else self._logits(view, i, past)
            score = formula.cluster_scores(cluster, worth, proto.shape[1], self.reducer == "mean")
            found.append(formula.whole_clusters_first(cluster, score, attention[i]))
        return torch.nn.functional.pad(torch.stack(found), (0, view.n - past))

    def _logits(self, view: KVView, i: int, past: int) -> Tensor:
        """[H, past] logits summed over the window, averaged over the GQA group."""
        total = view.queries[i].float().sum(0).unflatten(0, (view.heads, -1)).mean(1)
        return (view.keys[i, :, :past].float() @ total[..., None])[..., 0] * view.scale
