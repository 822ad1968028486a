"""The plots of `vllm-ext bench serving`, from one or several of its records and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_ext.bench.serving import demand
from vllm_ext.options import ConfigError

Record = dict[str, Any]


def read(paths: Sequence[Path]) -> list[Record]:
    """Records of `vllm-ext bench serving`.

    Raises:
        ConfigError: a file that is none.
    """
    found = []
    for path in paths:
        try:
            record = json.loads(path.read_text())
            fitting = record["command"] == "bench serving" and all(len(r["cells"]) for r in record["results"])
        except (OSError, ValueError, KeyError, TypeError):
            fitting = False
        if not fitting:
            raise ConfigError(f"{path} is no record of `vllm-ext bench serving` (serving.json); name one that is.")
        found.append(record)
    return found


def crossover(records: Sequence[Record]) -> dict[str, list[tuple[float, float]]]:
    """Row -> (demand, tokens/s over stock) of every load of every record, by demand.

    Demand: see `serving.demand`.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for result in record["results"][1:]:
            points.setdefault(result["label"], []).extend((demand(record, c), c["ratio"]) for c in result["cells"])
    return {label: sorted(found) for label, found in points.items()}


def plot(records: Sequence[Record], path: Path) -> Path:
    """Left: throughput over stock against demand. Right: blocks in use over time in the load of most demand."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for label, points in crossover(records).items():
        left.plot(*zip(*points), marker="o", label=label)
    left.axhline(1, color="black", linewidth=0.8)
    left.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    left.set(xscale="log", xlabel="tokens of the load / tokens of the stock pool", ylabel="tokens/s over stock")
    if left.get_legend_handles_labels()[0]:
        left.legend(fontsize=7)
    record, at = max(
        ((r, i) for r in records for i in range(len(r["results"][0]["cells"]))),
        key=lambda x: demand(x[0], x[0]["results"][0]["cells"][x[1]]),
    )
    for result in record["results"]:
        seconds, used, _ = zip(*result["cells"][at]["timeline"])
        right.plot(seconds, [100 * u for u in used], label=result["label"])
    right.set(xlabel="seconds", ylabel="blocks in use, %", ylim=(0, 105))
    right.set_title(record["results"][0]["cells"][at]["load"], fontsize=10)
    right.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
