"""Labelled totals of a worker, visible as `vllm_ext:*` at the server's `/metrics`.

Rank 0 of the workers writes them to a small JSON file that the server's process reads when it is scraped; with several
API servers, to prometheus_client's own files. (The attention counters of `metrics` are written in every step by every
rank, in a binary form of their own.)
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

INTERVAL_S = 0.25
"""Least time between two writes."""

Sample = tuple[str, dict[str, str], float]
"""(name, labels, total since the engine started)."""


class Publisher:
    """Hands a worker's totals on; never raises: metrics must not stop serving.

    Args:
        vllm_config: names the engine; ranks other than 0 publish nothing, since they count the same.
        family, part: name the file, one for each publisher of a process.
        help: name -> text of every total.
    """

    def __init__(self, vllm_config: Any, family: str, help: Mapping[str, str], part: str = "") -> None:
        self._help, self._due = help, 0.0
        self._last: dict[Any, float] = {}
        self._file: Any = None
        if vllm_config.parallel_config.rank:
            return
        with contextlib.suppress(OSError):
            self._file = metrics._folder() / f"{family}-{vllm_config.instance_id}-{os.getpid()}{part}"
            atexit.register(self._file.unlink, missing_ok=True)

    def due(self) -> bool:
        """Whether `write` may be called again; then the next time is `INTERVAL_S` away."""
        now = time.monotonic()
        if self._file is None or now < self._due:
            return False
        self._due = now + INTERVAL_S
        return True

    def write(self, samples: Iterable[Sample]) -> None:
        """Publish totals."""
        samples = list(samples)
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            self._count(samples)
            return
        with contextlib.suppress(OSError):
            part = self._file.with_suffix(".part")
            part.write_text(json.dumps({"at": time.time_ns(), "samples": samples}))
            part.replace(self._file)

    def _count(self, samples: Iterable[Sample]) -> None:
        for name, labels, value in samples:
            key = (name, *sorted(labels.items()))
            counter = _counter(name, self._help[name], tuple(labels))
            (counter.labels(**labels) if labels else counter).inc(max(0.0, value - self._last.get(key, 0)))
            self._last[key] = value


_cached: dict[str, Any] = {}


def _counter(name: str, text: str, labels: tuple[str, ...]) -> Any:
    from prometheus_client import Counter

    if name not in _cached:
        _cached[name] = Counter(f"vllm_ext:{name}", text, labels)
    return _cached[name]


class Collector:
    """Prometheus collector of one engine's totals of a family."""

    def __init__(self, instance_id: str, family: str, help: Mapping[str, str]) -> None:
        self.instance_id, self.family, self.help, self.since_ns = instance_id, family, help, time.time_ns()

    def read(self) -> list[Sample]:
        """What the engine's workers have published; equal samples of several files are added up."""
        found: dict[Any, Sample] = {}
        for path in metrics._folder().glob(f"{self.family}-{self.instance_id}-*"):
            with contextlib.suppress(OSError, ValueError):
                data = json.loads(path.read_text())
                if data["at"] < self.since_ns:
                    continue
                for name, labels, value in data["samples"]:
                    key = (name, *sorted(labels.items()))
                    found[key] = name, labels, value + (found[key][2] if key in found else 0)
        return list(found.values())

    def collect(self) -> Iterable[Any]:
        """One counter family a name."""
        from prometheus_client.core import CounterMetricFamily

        families: dict[str, Any] = {}
        for name, labels, value in self.read():
            if name not in families:
                families[name] = CounterMetricFamily(f"vllm_ext:{name}", self.help[name], labels=list(labels))
            families[name].add_metric(list(labels.values()), value)
        return families.values()

    def describe(self) -> Iterable[Any]:
        """Nothing: keeps prometheus_client from collecting at registration."""
        return []


def install_collector(vllm_config: Any, family: str, help: Mapping[str, str]) -> None:
    """Make the engine's totals visible in this process' Prometheus registry; once an engine."""
    from prometheus_client import REGISTRY

    if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        REGISTRY.register(Collector(vllm_config.instance_id, family, help))
