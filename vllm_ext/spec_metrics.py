"""Counters of speculation, by drafter and rule, as `vllm_ext:spec_*` at the server's `/metrics`.

One worker (rank 0) writes its totals to a small JSON file that the server's process reads when it is scraped; with
several API servers, to prometheus_client's own files. The same way as `metrics`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_ext import metrics

HELP = {
    "spec_steps": "verifications of a request's drafts",
    "spec_drafted": "draft tokens verified",
    "spec_accepted": "draft tokens accepted",
    "spec_accepted_at": "draft tokens accepted, by position in the draft",
    "spec_draft_seconds": "time spent in the look-up drafters on the host",
}
INTERVAL_S = 0.25
"""Least time between two writes."""

Sample = tuple[str, dict[str, str], float]


class Publisher:
    """Hands a worker's totals on; never raises: metrics must not stop serving.

    Args:
        vllm_config: names the engine; ranks other than 0 publish nothing, since they draft the same tokens.
        rule: name of the verification rule.
    """

    def __init__(self, vllm_config: Any, rule: str) -> None:
        self.rule, self._due = rule, 0.0
        self._last: dict[Any, float] = {}
        self._file: Any = None
        if vllm_config.parallel_config.rank:
            return
        with contextlib.suppress(OSError):
            path = metrics._folder() / f"spec-{vllm_config.instance_id}-{os.getpid()}"
            self._file = path
            atexit.register(path.unlink, missing_ok=True)

    def publish(self, arms: Sequence[str], counters: Any, seconds: float) -> None:
        """Totals of each arm, [len(arms), 3 + K] as in `lookup.step`; written at most every `INTERVAL_S`."""
        now = time.monotonic()
        if now < self._due or self._file is None:
            return
        self._due = now + INTERVAL_S
        samples = list(self.samples(arms, counters, seconds))
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            self._count(samples)
            return
        with contextlib.suppress(OSError):
            part = self._file.with_suffix(".part")
            part.write_text(json.dumps({"at": time.time_ns(), "samples": samples}))
            part.replace(self._file)

    def samples(self, arms: Sequence[str], counters: Any, seconds: float) -> Iterable[Sample]:
        """(name, labels, total) of everything that is not zero."""
        for arm, row in zip(arms, counters.tolist()):
            labels = {"drafter": arm, "rule": self.rule}
            for name, value in zip(("spec_steps", "spec_drafted", "spec_accepted"), row):
                if value:
                    yield name, labels, value
            for position, value in enumerate(row[3:]):
                if value:
                    yield "spec_accepted_at", {**labels, "position": str(position)}, value
        yield "spec_draft_seconds", {"drafter": "all", "rule": self.rule}, seconds

    def _count(self, samples: Sequence[Sample]) -> None:
        for name, labels, value in samples:
            key = (name, *sorted(labels.items()))
            _counter(name, tuple(labels)).labels(**labels).inc(max(0.0, value - self._last.get(key, 0)))
            self._last[key] = value


_cached: dict[str, Any] = {}


def _counter(name: str, labels: tuple[str, ...]) -> Any:
    from prometheus_client import Counter

    if name not in _cached:
        _cached[name] = Counter(f"vllm_ext:{name}", HELP[name], labels)
    return _cached[name]


class Collector:
    """Prometheus collector of one engine's speculation counters."""

    def __init__(self, instance_id: str) -> None:
        self.instance_id, self.since_ns = instance_id, time.time_ns()

    def read(self) -> list[Sample]:
        """What the engine's workers have published."""
        found: list[Sample] = []
        for path in metrics._folder().glob(f"spec-{self.instance_id}-*"):
            with contextlib.suppress(OSError, ValueError):
                data: Mapping[str, Any] = json.loads(path.read_text())
                if data["at"] >= self.since_ns:
                    found += [(name, labels, value) for name, labels, value in data["samples"]]
        return found

    def collect(self) -> Iterable[Any]:
        """One counter family a name."""
        from prometheus_client.core import CounterMetricFamily

        families: dict[str, Any] = {}
        for name, labels, value in self.read():
            if name not in families:
                families[name] = CounterMetricFamily(f"vllm_ext:{name}", HELP[name], labels=list(labels))
            families[name].add_metric(list(labels.values()), value)
        return families.values()

    def describe(self) -> Iterable[Any]:
        """Nothing: keeps prometheus_client from collecting at registration."""
        return []


def install_collector(vllm_config: Any) -> None:
    """Make the engine's counters visible in this process' Prometheus registry; once an engine."""
    from prometheus_client import REGISTRY

    if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        REGISTRY.register(Collector(vllm_config.instance_id))
