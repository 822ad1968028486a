"""Tables and plots of an evaluation, made from its record and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_ext.evaluation.rows import CONTROL
from vllm_ext.options import ConfigError


def check_plots() -> None:
    """Refuse before any engine starts if plots cannot be drawn.

    Raises:
        ConfigError: matplotlib is missing.
    """
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib; install 'vllm-ext[bench]' or leave --out away.")


TITLES = {
    "niah": ["needles"],
    "kl": ["mean KL, nats", "median", "p99", "same top token"],
    "ppl": ["perplexity", "NLL over dense"],
    "gen": ["NLL of own text", "over dense", "KL on own text", "distinct 4-grams"],
}


def tables(results: list[dict[str, Any]]) -> list[Any]:
    """Rich tables: one a task that was run, then what decode steps read where a row counts it."""
    found = [_task_table(results, task) for task in TITLES if any(r.get(task) for r in results)]
    reads = _read_table(results)
    return [*found, reads] if reads.row_count else found


def _task_table(results: list[dict[str, Any]], task: str) -> Any:
    """One line for each row and length."""
    from rich.table import Table

    out = Table(title=f"{task} (95 % intervals)")
    out.add_column("row", overflow="fold")
    for title in ("length", *TITLES[task]):
        out.add_column(title, justify="right")
    for result in results:
        for cell in sorted(result.get(task, []), key=lambda c: c["length"]):
            out.add_row(result["label"], str(cell["length"]), *_cells(task, cell))
    return out


def _read_table(results: list[dict[str, Any]]) -> Any:
    """What decode steps read (`reads.Meter.cell`): one line for each row, task and length that counts it."""
    from rich.table import Table

    out = Table(title="read by decode steps, relative to dense")
    out.add_column("row", overflow="fold")
    for title in ("task", "length", "keys, sparse layers", "bytes, sparse layers", "bytes, all layers"):
        out.add_column(title, justify="right")
    for result in results:
        for task, c in ((t, c) for t in TITLES for c in result.get(t, []) if "read" in c):
            shares = [f"{c['read'][name]:.1%}" for name in ("density", "bytes_sparse_layers", "bytes")]
            out.add_row(result["label"], task, str(c["length"]), *shares)
    return out


def _cells(task: str, cell: dict[str, Any]) -> list[str]:
    if task == "niah":
        return [f"{cell['correct']}/{cell['samples']} ({cell['low']:.2f}–{cell['high']:.2f})"]
    more = "–"
    if "nll_more" in cell:
        more = f"{cell['nll_more']:+.4f} ({cell['nll_more_low']:+.3f}–{cell['nll_more_high']:+.3f})"
    if task == "ppl":
        return [f"{cell['ppl']:.3f} ({cell['low']:.3f}–{cell['high']:.3f})", more]
    if task == "gen":
        kl = f"{cell['kl']:.4f} ({cell['kl_low']:.3f}–{cell['kl_high']:.3f})" if "kl" in cell else "–"
        repeats = f"{cell['distinct']:.1%} ({cell['distinct_low']:.1%}–{cell['distinct_high']:.1%})"
        return [f"{cell['nll']:.4f} ({cell['nll_low']:.3f}–{cell['nll_high']:.3f})", more, kl, repeats]
    return [
        f"{cell['mean']:.5f} ({cell['low']:.5f}–{cell['high']:.5f})",
        f"{cell['median']:.5f}",
        f"{cell['p99']:.4f}",
        f"{cell['agree']:.4f} ({cell['agree_low']:.3f}–{cell['agree_high']:.3f})",
    ]


MEASURES = {
    "niah": ("needles found", "accuracy", "low", "high"),
    "kl": ("mean KL to dense, nats", "mean", "low", "high"),
    "ppl": ("NLL over dense, nats", "nll_more", "nll_more_low", "nll_more_high"),
    "gen": ("NLL of own text over dense's, nats", "nll_more", "nll_more_low", "nll_more_high"),
}


def plot(results: list[dict[str, Any]], path: Path) -> Path:
    """Draw each measure against the budget, one panel for each task and length, and return `path`.

    Rows without a budget stand at the length itself, under their own name; the dense row is a band.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(t, n) for t in MEASURES for n in sorted({c["length"] for r in results for c in r.get(t, [])})]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), squeeze=False)
    for axis, (task, length) in zip(axes[0], panels):
        _panel(axis, results, task, length)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _panel(axis: Any, results: list[dict[str, Any]], task: str, length: int) -> None:
    title, value, low, high = MEASURES[task]
    series: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for result in results:
        cell = next((c for c in result.get(task, []) if c["length"] == length), None)
        if cell is None or value not in cell:
            continue
        if result["label"] == CONTROL:
            continue
        if not result["options"]:
            axis.axhline(cell[value], color="black", linewidth=1, label="dense")
            axis.axhspan(cell[low], cell[high], color="black", alpha=0.08)
            continue
        budget = result.get("budget")
        name = "+".join(result["options"]) if budget else result["label"]
        series.setdefault(name, []).append((budget or length, cell))
    for name, points in series.items():
        points.sort(key=lambda p: p[0])
        heights = [c[value] for _, c in points]
        spread = [[max(c[value] - c[low], 0) for _, c in points], [max(c[high] - c[value], 0) for _, c in points]]
        axis.errorbar([b for b, _ in points], heights, yerr=spread, marker="o", capsize=3, label=name)
    if series:
        axis.set_xscale("log", base=2)
        axis.set_xlabel("budget, keys a query")
    if task in ("ppl", "gen"):
        axis.axhline(0, color="black", linewidth=1, label="dense")
    if task == "kl" and series:
        axis.set_yscale("log")
    axis.set_ylabel(title)
    axis.set_title(f"{task}, {length} tokens", fontsize=10)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)
