"""The records of `vllm-ext kv-error` and `vllm-ext train trim` as Markdown tables; part of `results.KINDS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_ext.markdown import table

Record = dict[str, Any]


def error_table(record: Record) -> str:
    """A row a method, a column a share of the prompt: mean error with its interval, and how much of the gap is closed.

    The gap lies between random tokens and the oracle's.
    """
    cells = {(r["label"], r["ratio"]): r for r in record["results"]}
    ratios = list(dict.fromkeys(r["ratio"] for r in record["results"]))
    rows = []
    for label in dict.fromkeys(r["label"] for r in record["results"]):
        row = [label if label == "oracle" else f"`{label}`"]
        for x in ratios:
            found, noise, best = (cells[name, x] for name in (label, "random_kv", "oracle"))
            closed = (noise["mean"] - found["mean"]) / (noise["mean"] - best["mean"])
            row.append(f"{found['mean']:.3f} ({found['low']:.3f}–{found['high']:.3f}); {closed:.0%}")
        rows.append(row)
    return table(("method", *(f"{x:.0%} kept: error; of the gap closed" for x in ratios)), rows)


def _error_title(record: Record) -> str:
    s = record["settings"]
    what = f"{s['length']} tokens compressed, {s['positions']} forced behind them, {s['texts']} texts"
    return f"Relative error of attention outputs, {s['model']}: {what}"


def trim_table(record: Record) -> str:
    """What a run cost, and the losses on held-out text."""
    found = record["results"]
    s, after = found["settings"], found["held_out"]["after"]
    cost = [str(s["steps"]), f"{s['steps'] * s['batch'] * s['window'] / 1e6:.0f} M", f"{found['seconds']:.0f}"]
    capacity = [f"{found['held_out'][k]['capacity']:.3f}" for k in ("before", "after")]
    head = (
        "steps",
        "tokens seen",
        "seconds",
        "memory",
        "window",
        "capacity loss before",
        "after",
        "KL to full attention",
    )
    return table(head, [[*cost, str(s["memory"]), str(s["window"]), *capacity, f"{after['kl']:.3f}"]])


KINDS: dict[str, tuple[Callable[[Record], str], Callable[[Record], str]]] = {
    "kv-error": (_error_title, error_table),
    "train trim": (lambda r: "Retention gates of trim_kv", trim_table),
}
