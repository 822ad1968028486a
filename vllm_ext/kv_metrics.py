"""Counters of evictions, `vllm_ext:kv_*`; see `totals`. Pool usage: vLLM's `vllm:kv_cache_usage_perc`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_ext import totals

FAMILY = "kv"
HELP = {
    "kv_compactions": "evictions, each of one request in the layers of one KV-cache group",
    "kv_tokens_kept": "tokens that survived evictions, per KV head and layer",
    "kv_tokens_dropped": "tokens that evictions dropped, per KV head and layer",
    "kv_blocks_freed": "KV blocks that running requests gave back",
    "kv_compaction_seconds": "host time of evictions",
}


class Publisher(totals.Publisher):
    """Hands the totals of a worker's KV-cache group on."""

    def __init__(self, vllm_config: Any, group: str) -> None:
        super().__init__(vllm_config, FAMILY, HELP, f"-{group}")
        self._published: dict[str, float] = dict.fromkeys(HELP, 0.0)

    def publish(self, found: Mapping[str, float]) -> None:
        """Totals by name, where they changed."""
        if found != self._published and self.due():
            self._published = dict(found)
            self.write((name, {}, value) for name, value in found.items())
