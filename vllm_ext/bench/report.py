"""Tables and plots of benchmarks, made from their records and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def decode_table(results: list[dict[str, Any]]) -> Any:
    """A rich table of decode times: one line for each case and row."""
    from rich.table import Table

    title = f"decode, copy bandwidth {results[0]['copy_bandwidth'] / 1e12:.2f} TB/s" if results else "decode"
    table = Table(title=title)
    table.add_column("case")
    table.add_column("row", overflow="fold")
    for name in ("TPOT ms", "step IQR ms", "tok/s", "vs dense", "floor ms", "of floor", "bytes read", "graphs"):
        table.add_column(name, justify="right")
    for case in dict.fromkeys(c["case"] for r in results for c in r.get("cells", [])):
        for result in results:
            for cell in result.get("cells", []):
                if cell["case"] == case:
                    table.add_row(case, result["label"], *_decode_cells(cell))
    return table


def _decode_cells(cell: dict[str, Any]) -> list[str]:
    if "skipped" in cell:
        return [cell["skipped"]]
    low, high = cell["step_iqr_s"]
    ratio = "–" if cell["ratio"] is None else f"{cell['ratio']:.3f}x"
    return [
        f"{cell['tpot_s'] * 1e3:.3f}",
        f"{low * 1e3:.3f}–{high * 1e3:.3f}",
        f"{cell['tokens_per_s']:.0f}",
        ratio,
        f"{cell['floor_s'] * 1e3:.3f}",
        f"{cell['floor_fraction']:.0%}",
        f"{cell['read']['bytes']:.1%}" if "read" in cell else "–",
        " ".join(f"{mode} {n}/{cell['steps']}" for mode, n in sorted(cell["graph_modes"].items())) or "none",
    ]


def decode_plot(results: list[dict[str, Any]], path: Path) -> Path:
    """Bars of TPOT for each case and row, with the quartiles of the steps and the byte floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(c["case"] for r in results for c in r.get("cells", []) if "tpot_s" in c))
    figure, axes = pyplot.subplots(1, max(len(cases), 1), figsize=(3.6 * max(len(cases), 1), 3.8), squeeze=False)
    for axis, case in zip(axes[0], cases):
        for number, result in enumerate(results):
            cell = next((c for c in result.get("cells", []) if c["case"] == case and "tpot_s" in c), None)
            if cell is None:
                continue
            top = cell["tpot_s"] * 1e3
            low, high = (q * 1e3 for q in cell["step_iqr_s"])
            axis.bar(number, top, yerr=[[max(top - low, 0)], [max(high - top, 0)]], capsize=3, label=result["label"])
            axis.hlines(cell["floor_s"] * 1e3, number - 0.4, number + 0.4, color="black")
            axis.text(number, top, f"{cell['ratio']:.2f}x" if cell["ratio"] else "", ha="center", va="bottom")
        axis.set_title(case, fontsize=10)
        axis.set_xticks([])
        axis.set_ylabel("time per output token, ms (line: byte floor)", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, fontsize=7)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def kernel_table(results: list[dict[str, Any]]) -> Any:
    """A rich table of kernel times against their byte floors."""
    from rich.table import Table

    table = Table(title="kernels (CUDA graph replays, medians)")
    table.add_column("case")
    table.add_column("kernel", overflow="fold")
    for name in ("us", "floor us", "of copy bandwidth", "vs fastest dense", "error"):
        table.add_column(name, justify="right")
    for row in results:
        if "skipped" in row:
            table.add_row(row["case"], row["kernel"], row["skipped"])
            continue
        share = f"{row['floor_s'] / row['time_s']:.0%}" if row["floor_s"] else "–"
        ratio = f"{row['vs_dense']:.2f}x" if row.get("vs_dense") else "–"
        error = f"{row['error']:.1e}" if row.get("error") is not None else "–"
        table.add_row(
            row["case"],
            row["kernel"],
            f"{row['time_s'] * 1e6:.1f}",
            f"{row['floor_s'] * 1e6:.1f}" if row["floor_s"] else "–",
            share,
            ratio,
            error,
        )
    return table
