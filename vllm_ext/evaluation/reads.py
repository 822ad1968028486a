"""What the decode steps of a task read: the counters of the sparse attention layers, before and after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_ext.metrics import NAMES, Counters


@dataclass(frozen=True)
class Group:
    """Attention layers with one page table; `layers` of them see the whole context, the method's stages serve some."""

    stages: Any
    layers: int

    def totals(self) -> dict[str, int]:
        """Counters since the engine started (`metrics.NAMES`), those of the last step included."""
        d = self.stages.dims
        values = self.stages.stats.tolist()
        return dict(zip(NAMES, Counters(len(d.layers) * d.num_kv_heads, self.stages.page_bytes, values).totals()))


class Meter:
    """Counts from now on.

    Args:
        llm: an engine whose worker lives in this process.
    """

    def __init__(self, llm: Any) -> None:
        self.groups = _groups(llm)
        self.before = self._totals()

    def _totals(self) -> list[dict[str, int]]:
        if self.groups:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
        return [g.totals() for g in self.groups]

    def cell(self) -> dict[str, Any]:
        """`{"read": {...}}` of the decode steps since the start; {} without sparse layers or decode steps.

        The sums of `metrics.NAMES`, and three shares of what dense attention would have read in the same steps:
        `density` (keys) and `bytes_sparse_layers` in the sparse layers, `bytes` in all layers that see the whole
        context, hence with the method's dense layers. Bytes are those of keys, values and what is read to choose.
        """
        since = [{n: after[n] - old[n] for n in NAMES} for old, after in zip(self.before, self._totals())]
        if not sum(s["keys_visible"] for s in since):
            return {}
        read = dense = rest = 0.0
        for group, s in zip(self.groups, since):
            d = group.stages.dims
            key = 2 * d.head_size * d.dtype.itemsize  # a key and its value
            read += s["keys_read"] * key + s["select_bytes"]
            dense += s["keys_visible"] * key
            rest += s["keys_visible"] * key * (group.layers - len(d.layers)) / len(d.layers)
        sums = {n: (max if n.endswith("_steps") else sum)(s[n] for s in since) for n in NAMES}
        shares = {"density": sums["keys_read"] / sums["keys_visible"], "bytes_sparse_layers": read / dense}
        return {"read": {**sums, **shares, "bytes": (read + rest) / (dense + rest)}}


def _groups(llm: Any) -> list[Group]:
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    groups = [g for groups in worker.model_runner.attn_groups for g in groups]
    stages = [(getattr(g.get_metadata_builder(0), "stages", None), g) for g in groups]
    return [Group(s, len(g.layer_names)) for s, g in stages if s is not None]
