"""Counters of evictions, `vllm_ext:kv_*` at the server's `/metrics`. Pool usage: vLLM's `vllm:kv_cache_usage_perc`.

Rank 0 of the workers writes its totals to a small JSON file that the server's process reads when it is scraped; with
several API servers, to prometheus_client's own files. The same way as `metrics`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

from vllm_ext import metrics

HELP = {
    "kv_compactions": "evictions, each of one request in the layers of one KV-cache group",
    "kv_tokens_kept": "tokens that survived evictions, per KV head and layer",
    "kv_tokens_dropped": "tokens that evictions dropped, per KV head and layer",
    "kv_blocks_freed": "KV blocks that running requests gave back",
    "kv_compaction_seconds": "host time of evictions",
}
INTERVAL_S = 0.25
"""Least time between two writes."""


class Publisher:
    """Hands the totals of a worker's KV-cache group on; never raises: metrics must not stop serving."""

    def __init__(self, vllm_config: Any, group: str) -> None:
        self._due, self._last = 0.0, dict.fromkeys(HELP, 0.0)
        self._file: Any = None
        if vllm_config.parallel_config.rank:
            return  # other ranks evict the same tokens
        with contextlib.suppress(OSError):
            self._file = metrics._folder() / f"kv-{vllm_config.instance_id}-{os.getpid()}-{group}"
            atexit.register(self._file.unlink, missing_ok=True)

    def publish(self, totals: Mapping[str, float]) -> None:
        """Totals by name, where they changed; written at most every `INTERVAL_S`."""
        now = time.monotonic()
        if self._file is None or now < self._due or totals == self._last:
            return
        self._due, before, self._last = now + INTERVAL_S, self._last, dict(totals)
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            for name, value in totals.items():
                _counter(name).inc(max(0.0, value - before[name]))
            return
        with contextlib.suppress(OSError):
            part = self._file.with_suffix(".part")
            part.write_text(json.dumps({"at": time.time_ns(), "totals": self._last}))
            part.replace(self._file)


_cached: dict[str, Any] = {}


def _counter(name: str) -> Any:
    from prometheus_client import Counter

    if name not in _cached:
        _cached[name] = Counter(f"vllm_ext:{name}", HELP[name])
    return _cached[name]


class Collector:
    """Prometheus collector of one engine's evictions."""

    def __init__(self, instance_id: str) -> None:
        self.instance_id, self.since_ns = instance_id, time.time_ns()

    def read(self) -> dict[str, float]:
        """Totals over the KV-cache groups of the engine; empty before the first eviction."""
        totals: dict[str, float] = {}
        for path in metrics._folder().glob(f"kv-{self.instance_id}-*"):
            with contextlib.suppress(OSError, ValueError):
                data = json.loads(path.read_text())
                if data["at"] >= self.since_ns:
                    for name, value in data["totals"].items():
                        totals[name] = totals.get(name, 0) + value
        return totals

    def collect(self) -> Iterable[Any]:
        """One counter a name."""
        from prometheus_client.core import CounterMetricFamily

        for name, value in self.read().items():
            yield CounterMetricFamily(f"vllm_ext:{name}", HELP[name], value=value)

    def describe(self) -> Iterable[Any]:
        """Nothing: keeps prometheus_client from collecting at registration."""
        return []


def install_collector(vllm_config: Any) -> None:
    """Make the engine's counters visible in this process' Prometheus registry; once an engine."""
    from prometheus_client import REGISTRY

    if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        REGISTRY.register(Collector(vllm_config.instance_id))
