"""The records of the KV managers (serving, kernels, errors, gates) as Markdown tables; part of `results.KINDS`."""

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


def serving_rows(record: Record) -> str:
    """A row a load and engine: throughput, concurrency, latencies, and where the time went."""
    from vllm_ext.bench.serving import demand, eviction_share

    rows = []
    for i, load in enumerate(c["load"] for c in record["results"][0]["cells"]):
        for number, result in enumerate(record["results"]):
            c, share = result["cells"][i], eviction_share(result["cells"][i])
            row = [load, f"{demand(record, c):.1f}x", f"`{result['label']}`" if number else "stock"]
            row += [f"{c['tokens_per_s']:.0f}", f"{c['ratio']:.2f}x", str(c["peak_running"]), str(c["preemptions"])]
            row += [f"{c['ttft_p50_s']:.1f} / {c['ttft_p99_s']:.1f}"]
            row += [f"{c['tpot_p50_s'] * 1e3:.1f} / {c['tpot_p99_s'] * 1e3:.1f}"]
            row += [f"{c['prompt_share']:.0%}" if "prompt_tokens" in c else "–"]  # older records count other steps
            rows.append([*row, "–" if share is None else f"{share:.1%}"])
    head = (
        "requests x prompt + output", "tokens of the load / of the stock pool", "row", "tokens/s", "over stock",
        "most running", "preempted", "TTFT p50 / p99, s", "TPOT p50 / p99, ms", "time in steps with prompts",
        "evicting",
    )  # fmt: skip
    return table(head, rows)


def _serving_title(record: Record) -> str:
    gib = record["results"][0]["pool_bytes"] / 2**30
    return f"Serving, {record['settings']['shape']} shape, dummy weights, {gib:.1f} GiB of KV cache in every row"


def kv_kernel_table(record: Record) -> str:
    """A row a kernel and length: time, bytes that must move, and how near their floor."""
    [found] = record["results"]
    rows = [
        [k["kernel"], str(k["tokens"]), f"{k['seconds'] * 1e6:.1f}", f"{k['bytes'] / 2**20:.1f}",
         f"{k['bytes_per_s'] / 1e9:.0f}", f"{k['of_floor']:.0%}"]
        for k in found["kernels"]
    ]  # fmt: skip
    for step in found.get("r_kv_evictions", []):
        many = f"{step['requests']} requests evict" if step["requests"] > 1 else "a request evicts"
        rows.append([f"a whole step in which {many} (r_kv)", "", f"{step['seconds'] * 1e6:.0f}", "", "", ""])
    return table(("kernel", "resident tokens", "us", "MiB that must move", "GB/s", "of its floor"), rows)


def _kv_kernel_title(record: Record) -> str:
    bandwidth = record["results"][0]["copy_bandwidth"] / 1e12
    return f"Kernels of the eviction engine, Llama-3.1-8B shape, copy bandwidth {bandwidth:.2f} TB/s"


KINDS: dict[str, tuple[Callable[[Record], str], Callable[[Record], str]]] = {
    "bench serving": (_serving_title, serving_rows),
    "bench kv kernels": (_kv_kernel_title, kv_kernel_table),
    "kv-error": (_error_title, error_table),
    "train trim": (lambda r: "Retention gates of trim_kv", trim_table),
}
