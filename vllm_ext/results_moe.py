"""The records of `vllm-ext moe` and of the expert layer's benchmarks as Markdown tables; part of `results.KINDS`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_ext.markdown import table

Record = dict[str, Any]


def routers_table(record: Record) -> str:
    """One line for each number of experts and tokens, microseconds."""
    rows = record["results"]
    names = list(rows[0]["seconds"])
    cells = [
        [f"{r['top_k']} of {r['experts']}", str(r["tokens"]), *(f"{r['seconds'][n] * 1e6:.1f}" for n in names)]
        for r in rows
    ]
    return table(["experts", "tokens", *(n.replace("_", " ") for n in names)], cells)


def compare_table(record: Record) -> str:
    """One line for each model: its size, perplexity and divergence from the first."""
    rows = []
    for result in record["results"]:
        ppl, kl = result["ppl"][0], (result.get("kl") or [{}])[0]
        more = f"{ppl['nll_more']:+.4f} ({ppl['nll_more_low']:+.4f}–{ppl['nll_more_high']:+.4f})" if kl else "–"
        mean = f"{kl['mean']:.4f} ({kl['low']:.4f}–{kl['high']:.4f})" if kl else "–"
        size = [str(result["num_experts"]), f"{result['parameters'] / 1e6:.0f} M"]
        rows.append([f"`{result['label']}`", *size, f"{ppl['ppl']:.3f}", more, mean])
    return table(
        ("model", "experts", "parameters", "perplexity", "NLL over the first, nats", "mean KL to it, nats"), rows
    )


def report_table(record: Record) -> str:
    """Local routing consistency of the model, and the layers' range."""
    found = record["results"]
    rows = [[m, f"{r['f1']:.1%}", f"{r['scale']:.2f}"] for m, r in found["srp"].items()]
    loads = [layer["imbalance"] for layer in found["layers"]]
    text = f"{found['tokens']} tokens of {found['requests']} requests; the most used expert of a layer has "
    text += f"{min(loads):.2f} to {max(loads):.2f} times the mean load."
    return f"{table(('window m', 'SRP', 'switched on / needed'), rows)}\n\n{text}"


def upcycle_table(record: Record) -> str:
    """Settings and losses of a training run."""
    r = record["results"]
    s = r["settings"]
    row = [f"{s['top_k']} of {s['experts']}", str(s["steps"]), str(s["batch"] * s["window"]), f"{r['seconds']:.0f}"]
    row += [f"{r['held_out_loss_before']:.4f}", f"{r['held_out_loss']:.4f}"]
    return table(("experts", "steps", "tokens a step", "seconds", "held-out loss before", "after"), [row])


def layer_table(record: Record) -> str:
    """One line for each shape and number of tokens, microseconds a call of the expert layer."""
    rows = []
    for r in record["results"]:
        floor, tuned = max(r["bytes_floor_s"], r["flops_floor_s"]), r.get("tuned_s") or r["default_s"]
        times = [f"{r[k] * 1e6:.1f}" if r.get(k) else "–" for k in ("default_s", "tuned_s", "sonic_s")]
        ratio = f"{min(tuned, r['default_s']) / r['sonic_s']:.2f}x"
        rows.append([r["shape"], str(r["tokens"]), *times, ratio, f"{floor * 1e6:.1f}", f"{floor / r['sonic_s']:.0%}"])
    head = ("shape", "tokens", "vLLM's experts", "with tuned tiles", "`sonic_moe`", "faster than the faster of both by")
    return table((*head, "floor", "of the floor"), rows)


def tiles_table(record: Record) -> str:
    """One line for each shape and number of tokens of a sweep: the tiles that are shipped beside vLLM's tuned ones."""
    rows = []
    for r in record["results"]:
        times = [f"{r[k] * 1e6:.1f}" for k in ("tuned_s", "sonic_s")]
        four = f"{r['tuned_four_s'] / r['sonic_four_s']:.2f}x" if "sonic_four_s" in r else "–"
        floor = [f"{r['floor_s'] * 1e6:.1f}", f"{r['floor_s'] / r['sonic_s']:.0%}"]
        served = "`sonic_moe`" if r["served"] else "vLLM"
        ratio = f"{r['tuned_s'] / r['sonic_s']:.2f}x"
        rows.append([r["shape"], str(r["tokens"]), *times, ratio, four, *floor, r["measured"], served])
    head = ("shape", "tokens", "vLLM, tuned tiles", "`sonic_moe`", "faster by", "four calls in a graph: by")
    return f"{table((*head, 'floor', 'of the floor', 'measured in', 'served by'), rows)}\n\n{record['note']}"


def tune_table(record: Record) -> str:
    """One line for each number of tokens: vLLM's own kernel with its default and with the best tiles found."""
    rows = []
    for r in record["results"]:
        c = r["config"]
        tile = f"{c['BLOCK_SIZE_M']} x {c['BLOCK_SIZE_N']} x {c['BLOCK_SIZE_K']}, {c['num_warps']} warps"
        gain = f"{r['default_s'] / r['time_s']:.2f}x"
        rows.append([str(r["tokens"]), f"{r['default_s'] * 1e6:.1f}", f"{r['time_s'] * 1e6:.1f}", gain, tile])
    return table(("tokens", "default, us", "tuned, us", "gain", "tiles M x N x K"), rows)


def _tiles_title(record: Record) -> str:
    return f"One expert layer from {min(r['tokens'] for r in record['results'])} tokens on, bfloat16, microseconds"


def _tune_title(record: Record) -> str:
    s = record["shape"]
    return f"Tiles of vLLM's expert kernel, {s['experts']} experts of {s['n']}, {s['k']} a token, width {s['d']}"


def _compare_title(record: Record) -> str:
    return f"Merged models beside {Path(record['settings']['model']).name} (95 % intervals)"


KINDS: dict[str, tuple[Callable[[Record], str], Callable[[Record], str]]] = {
    "bench routers": (lambda record: "Routers, microseconds a call (bfloat16 logits)", routers_table),
    "bench moe": (lambda record: "One expert layer, bfloat16, microseconds (CUDA graph replays, medians)", layer_table),
    "sweep of tiles, shipped rows": (_tiles_title, tiles_table),
    "moe tune": (_tune_title, tune_table),
    "moe upcycle": (lambda record: "Continued training of an upcycled model", upcycle_table),
    "moe report": (lambda record: f"Routing of {record['results']['model']}", report_table),
    "moe compare": (_compare_title, compare_table),
}
"""Command of a record -> (title, table)."""
