"""Counters of the workers, visible as `vllm_ext:*` at the server's `/metrics`.

The workers live in other processes than the HTTP server. Each worker writes its totals to a small file of its own
(`<temporary directory>/vllm-ext-<user>/<engine instance>-<rank>-<pid>`, 9 little-endian 64-bit integers); a Prometheus
collector in the server process sums the files of its engine at scrape time. With several API servers vLLM switches
prometheus_client to its multi-process mode; then the workers use that instead.
"""

from __future__ import annotations

import atexit
import contextlib
import getpass
import os
import struct
import tempfile
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = (
    "keys_read", "keys_visible", "pages_scored", "pages_read", "sparse_steps", "dense_steps", "select_bytes",
    "capped_rows",
)  # fmt: skip
HELP = {
    "keys_read": "keys read in decode steps, summed over sparse layers and KV heads",
    "keys_visible": "keys a dense decode step would have read, summed over sparse layers and KV heads",
    "pages_scored": "pages whose index was read, summed over sparse layers and KV heads",
    "pages_read": "pages read by sparse decode steps, summed over sparse layers and KV heads",
    "sparse_steps": "decode steps of a request that read a selection",
    "dense_steps": "decode steps of a request that read every key",
    "select_bytes": "bytes read to choose (page index, sampled keys), summed over sparse layers and KV heads",
    "capped_rows": "selections that a limit of the method cut short, summed over sparse layers and KV heads",
}
DENSITY_HELP = "keys read / keys visible in all decode steps so far"
_FORMAT = struct.Struct(f"<{len(NAMES)}qq")


@dataclass
class Counters:
    """Totals since the engine started, over layers and KV heads.

    `scale`: sparse layers x KV heads, how often one step is counted. `page_bytes`: read to score a page for a KV head.
    """

    scale: int = 1
    page_bytes: int = 0
    values: list[int] = field(default_factory=lambda: [0] * len(NAMES))

    def totals(self) -> list[int]:
        """The values in the order of NAMES, steps counted once per request and step."""
        v = list(self.values)
        return [*v[:4], v[4] // self.scale, v[5] // self.scale, v[6] + v[2] * self.page_bytes, v[7]]


def _folder() -> Path:
    """A private folder for the counter files of this user's engines."""
    path = Path(tempfile.gettempdir()) / f"vllm-ext-{getpass.getuser()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to another user")
    return path


class Exporter:
    """Writes one worker's totals where the server process finds them. Never raises: metrics must not stop serving.

    A model with sliding-window layers can have several attention groups in one worker, each with an exporter.
    """

    def __init__(self, vllm_config: Any, group: str = "") -> None:
        rank = vllm_config.parallel_config.rank
        key = (vllm_config.instance_id, rank)
        self._sink, self._group = _sinks.get(key) or _Sink(f"{key[0]}-{rank}", steps=rank == 0), group
        _sinks[key] = self._sink

    def write(self, counters: Counters) -> None:
        """Publish the totals if they changed; a few microseconds."""
        self._sink.write(self._group, counters.totals())


class _Sink:
    """The one place where a worker's exporters write. Ranks have heads of their own, but run the same steps."""

    def __init__(self, name: str, steps: bool = True) -> None:
        self._steps = steps
        self._file: Any = None
        self._parts: dict[str, list[int]] = {}
        self._last = [0] * len(NAMES)
        self._prometheus = None
        try:
            if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
                self._prometheus = _prometheus_counters()
                return
            path = _folder() / f"{name}-{os.getpid()}"
            self._file = path.open("wb", buffering=0)
            atexit.register(path.unlink, missing_ok=True)
        except OSError:
            self._file = None

    def write(self, group: str, totals: list[int]) -> None:
        """Keys and pages are summed over groups; a step of a request is one step, in however many groups."""
        if self._parts.get(group) == totals:
            return
        self._parts[group] = totals
        columns = list(zip(*self._parts.values()))
        merged = [max(c) * self._steps if name.endswith("_steps") else sum(c) for name, c in zip(NAMES, columns)]
        before, self._last = self._last, merged
        if self._prometheus is not None:
            for counter, new, old in zip(self._prometheus, merged, before):
                counter.inc(max(0, new - old))
        elif self._file is not None:
            with contextlib.suppress(OSError):
                self._file.seek(0)
                self._file.write(_FORMAT.pack(*merged, time.time_ns()))


_sinks: weakref.WeakValueDictionary[tuple[str, int], _Sink] = weakref.WeakValueDictionary()

_cached_counters: list[Any] | None = None


def _prometheus_counters() -> list[Any]:
    from prometheus_client import Counter

    global _cached_counters
    if _cached_counters is None:
        _cached_counters = [Counter(f"vllm_ext:{n}", HELP[n]) for n in NAMES]
    return _cached_counters


def read_totals(instance_id: str, since_ns: int = 0) -> dict[str, int]:
    """Totals of an engine's workers, summed; files written before `since_ns` (another engine's) are left out."""
    totals = dict.fromkeys(NAMES, 0)
    for path in _folder().glob(f"{instance_id}*"):
        try:
            data = path.read_bytes()
        except OSError:  # the worker has just ended
            continue
        if len(data) == _FORMAT.size:
            *values, stamp = _FORMAT.unpack(data)
            if stamp >= since_ns:
                for name, value in zip(NAMES, values):
                    totals[name] += value
    return totals


class Collector:
    """Prometheus collector of one engine's counters."""

    def __init__(self, instance_id: str) -> None:
        self.instance_id = instance_id
        self.since_ns = time.time_ns()

    def collect(self) -> Iterable[Any]:
        """One counter a name, and the density as a gauge (NaN before the first decode step)."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        totals = read_totals(self.instance_id, self.since_ns)
        for name, value in totals.items():
            yield CounterMetricFamily(f"vllm_ext:{name}", HELP[name], value=value)
        seen = totals["keys_visible"]
        density = totals["keys_read"] / seen if seen else float("nan")
        yield GaugeMetricFamily("vllm_ext:attention_density", DENSITY_HELP, value=density)

    def describe(self) -> Iterable[Any]:
        """Nothing: keeps prometheus_client from collecting at registration."""
        return []


_registered: set[str] = set()


def install_collector(vllm_config: Any) -> None:
    """Make the engine's counters visible in this process' Prometheus registry; idempotent."""
    from prometheus_client import REGISTRY

    if os.environ.get("PROMETHEUS_MULTIPROC_DIR") or vllm_config.instance_id in _registered:
        return
    _registered.add(vllm_config.instance_id)
    REGISTRY.register(Collector(vllm_config.instance_id))
