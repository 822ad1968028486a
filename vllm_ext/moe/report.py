"""What a routing trace says: load, imbalance, SRP, SCH, and how large an expert cache would have to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vllm_ext.moe import consistency
from vllm_ext.moe.trace_file import Trace
from vllm_ext.options import ConfigError

WINDOWS = (4, 16, 64, 256)
"""Windows m of SRP, in tokens (the paper's)."""
RATIOS = (1.0, 1.5, 2.0, 3.0, 4.0)
"""Cache slots over experts a token at which hit rates are computed."""
SEGMENT = 512
"""Tokens of a segment (the paper's)."""
CACHE_WINDOW = 16


def analyse(trace: Trace, *, target: float = 0.9, segments: int = 64) -> dict[str, Any]:
    """The report of a trace as JSON types.

    Args:
        trace: the trace.
        target: hit rate that the recommended cache must reach with SCH.
        segments: most segments in the cache simulations, evenly spread; the rest uses all.

    Raises:
        ConfigError: `target` is no share, no segments, or the trace has none of the shortest window.
    """
    if not 0 < target <= 1:
        raise ConfigError(f"--target must be above 0 and at most 1, got {target}.")
    if segments < 1:
        raise ConfigError(f"--segments must be at least 1, got {segments}.")
    cut = consistency.segments(trace.requests, SEGMENT)
    if max(map(len, cut)) < WINDOWS[0]:
        raise ConfigError(f"the trace holds no {WINDOWS[0]} consecutive tokens; trace longer requests.")
    windows = [m for m in WINDOWS if max(map(len, cut)) >= m]
    layers: list[dict[str, Any]] = []
    rows: dict[int, Any] = dict.fromkeys(windows, 0)  # [segments, m + 1] of all layers
    for number, layer in enumerate(trace.layers):
        active = [consistency.activations(ids[:, number], trace.num_experts) for ids in cut]
        each = {m: [consistency.window_counts([a], m) for a in active] for m in windows}
        counts = {m: np.sum(each[m], axis=0) for m in windows}
        rows = {m: rows[m] + np.stack([c.sum(0) for c in each[m]]) for m in windows}
        load = consistency.load(active)
        layers.append(
            {
                "layer": layer,
                "imbalance": load.imbalance,
                "deviation": load.deviation,
                "unused": load.unused,
                "share": load.share.tolist(),
                "srp": {str(m): vars(consistency.srp(counts[m])) for m in windows},
                "cache": _caches(active[:: max(1, -(-len(active) // segments))], trace),
            }
        )
    return {
        "model": trace.model,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "tokens": len(trace.experts),
        "requests": len(trace.first),
        "segments": len(cut),
        "target": target,
        "srp": {
            str(m): vars(consistency.srp(rows[m])) | {"interval": consistency.srp_interval(rows[m])} for m in windows
        },
        "layers": layers,
        "slots": recommend([layer["cache"] for layer in layers], target),
    }


def _caches(active: consistency.Segments, trace: Trace) -> list[dict[str, Any]]:
    """Hit rates of one layer by number of slots."""
    widest = max(int(a.sum(1).max(initial=0)) for a in active)
    sizes = sorted({min(trace.num_experts, max(widest, round(r * trace.top_k))) for r in RATIOS})
    policies: tuple[consistency.Policy, ...] = ("sch", "lru", "belady")
    out = []
    for c in sizes:
        found = {p: consistency.hits(active, c, p, CACHE_WINDOW) for p in policies}
        rates = {p: consistency.rate(*counts) for p, counts in found.items()}
        out.append({"slots": c} | rates | {"sch_interval": consistency.hit_interval(*found["sch"])})
    return out


def recommend(layers: list[list[dict[str, Any]]], target: float) -> list[int | None]:
    """Fewest slots of each layer, among those tried, with a SCH of at least `target`; None where none reaches it."""
    return [next((row["slots"] for row in rows if row["sch"] >= target), None) for rows in layers]


def expert_bytes(config: dict[str, Any], width_key: str) -> int:
    """Bytes of one expert in a model with this config.json: three matrices of d x n."""
    size = {"float32": 4, "bfloat16": 2, "float16": 2}.get(str(config.get("torch_dtype") or config.get("dtype")), 2)
    return 3 * int(config["hidden_size"]) * int(config[width_key]) * size


def verdict(report: dict[str, Any]) -> str:
    """One sentence on expert offloading."""
    best = float(np.mean(_at_twice(report)))
    word = "suits" if best >= report["target"] else "does not suit"
    return f"at 2 x K slots a layer the best cache would hit {best:.1%}: this load {word} an expert cache"


def _at_twice(report: dict[str, Any]) -> list[float]:
    """SCH of each layer at the largest cache of at most 2K slots."""
    limit = 2 * report["top_k"]
    caches = [layer["cache"] for layer in report["layers"]]
    return [([row for row in rows if row["slots"] <= limit] or rows[:1])[-1]["sch"] for rows in caches]


def tables(report: dict[str, Any]) -> list[Any]:
    """Rich tables: the model's SRP, and one line a layer."""
    from rich.table import Table

    head = f"{report['model']}: {report['num_experts']} experts, {report['top_k']} a token"
    model = Table(title=f"{head}; {report['tokens']} tokens of {report['requests']} requests")
    for name in ("window m", "SRP", "95 % interval", "switched on / needed", "threshold"):
        model.add_column(name, justify="right")
    for m, row in report["srp"].items():
        low, high = row["interval"]
        part = f"{row['scale']:.2f}", f"{row['threshold']} of {m}"
        model.add_row(m, f"{row['f1']:.1%}", f"{low:.1%}–{high:.1%}", *part)
    layers = Table(title=f"layers (hit rates of an expert cache, look-ahead {CACHE_WINDOW} tokens)")
    sizes = sorted({row["slots"] for layer in report["layers"] for row in layer["cache"]})
    for name in ("layer", "max / mean load", "deviation", "unused", "SRP m=16", *(f"SCH {c}" for c in sizes), "slots"):
        layers.add_column(name, justify="right")
    for layer, slots in zip(report["layers"], report["slots"]):
        srp = layer["srp"].get("16")
        hits = {row["slots"]: f"{row['sch']:.1%}" for row in layer["cache"]}
        layers.add_row(
            str(layer["layer"]),
            f"{layer['imbalance']:.2f}",
            f"{layer['deviation']:.2f}",
            str(layer["unused"]),
            f"{srp['f1']:.1%}" if srp else "–",
            *(hits.get(c, "–") for c in sizes),
            str(slots) if slots else f"> {sizes[-1]}",
        )
    return [model, layers]


def plot(report: dict[str, Any], path: Path) -> Path:
    """Load by layer and expert, SRP by window, and hit rates by cache size, in one figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4))
    share = np.array([np.sort(layer["share"])[::-1] for layer in report["layers"]]) * report["num_experts"]
    image = left.imshow(share, aspect="auto", cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=left, label="load / mean")
    left.set(xlabel="expert, by load", ylabel="MoE layer", title="load")
    windows = [int(m) for m in report["srp"]]
    for layer in report["layers"]:
        middle.plot(windows, [layer["srp"][str(m)]["f1"] for m in windows], color="0.8", linewidth=0.8)
    middle.plot(windows, [report["srp"][str(m)]["f1"] for m in windows], marker="o", label="model")
    middle.set(xscale="log", xlabel="window, tokens", ylabel="SRP", ylim=(0, 1), title="local routing consistency")
    middle.legend()
    sizes = sorted({row["slots"] for layer in report["layers"] for row in layer["cache"]})
    for policy, label in (("belady", "Belady"), ("sch", "SCH"), ("lru", "LRU")):
        means = [np.mean([r[policy] for la in report["layers"] for r in la["cache"] if r["slots"] == c]) for c in sizes]
        right.plot(sizes, means, marker="o", label=label)
    right.axhline(report["target"], color="0.6", linestyle="--", label="target")
    right.set(xlabel="slots a layer", ylabel="hit rate, mean of the layers", ylim=(0, 1.02), title="expert cache")
    right.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def cache_text(report: dict[str, Any]) -> str:
    """What the recommended cache amounts to, as the rest of the verdict."""
    slots = [c if c is not None else report["num_experts"] for c in report["slots"]]
    text = f"; {sum(slots)} slots in all of {len(slots) * report['num_experts']} experts reach {report['target']:.0%}"
    if report.get("expert_bytes"):
        size = report["expert_bytes"]
        text += f", {sum(slots) * size / 2**30:.2f} of {len(slots) * report['num_experts'] * size / 2**30:.2f} GiB"
    return text + "."
