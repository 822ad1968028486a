"""The records of `vllm-ext bench spec` and `bench cost-table` as Markdown tables; part of `results.KINDS`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_ext.markdown import table

Record = dict[str, Any]
NONE = "–"


def spec_table(record: Record) -> str:
    """One line for each kind of prompts, requests in flight and row; rows that failed below."""
    results, settings = record["results"], record["settings"]
    cells = {(c["load"], c["batch"], r["label"]): c for r in results for c in r["cells"]}
    lines = []
    for load in settings["loads"]:
        for batch in settings["batches"]:
            for label in (r["label"] for r in results):
                if cell := cells.get((load, batch, label)):
                    lines.append([load, str(batch), label if label == "none" else f"`{label}`", *_spec_cells(cell)])
    head = ("prompts", "in flight", "row", "tokens/s (range)", "of none", "tokens a step", "acceptance length")
    text = table((*head, "accepted by position", "draft time", "same answers"), lines)
    notes = [f"* `{r['label']}` failed: {r['failed']}" for r in results if "failed" in r]
    notes += [_crossover(r) for r in results if any(r.get("crossover", {}).values())]
    notes += [_skipped(r) for r in results if r.get("skipped")]
    return "\n\n".join([text, "\n".join(notes)] if notes else [text])


def _crossover(result: Record) -> str:
    """From which number of requests on a row does not pay, and how much it drafts there."""
    drafted = {(c["load"], c["batch"]): c["drafted_per_step"] for c in result["cells"]}
    places = [(load, at) for load, at in result["crossover"].items() if at is not None]
    texts = [f"{load} from {at} in flight on ({drafted[load, at]:.2f} drafts a step)" for load, at in places]
    return f"* `{result['label']}` is slower than no speculation: {', '.join(texts)}."


def _skipped(result: Record) -> str:
    """What the row's time did not suffice for."""
    places = ", ".join(f"{load} with {batch} in flight" for load, batch in result["skipped"])
    return f"* `{result['label']}` ran out of time before {places}."


def _spec_cells(c: Record) -> list[str]:
    low, high = c["tokens_per_s_range"]
    speed = f"{c['tokens_per_s']:.0f}" + (f" ({low:.0f}–{high:.0f})" if len(c["seconds"]) > 1 else "")
    ratio = f"{c['ratio']:.2f}x" if "ratio" in c else NONE
    if len(spread := c.get("ratio_range", ())) == 2 and len(c["seconds"]) > 1:
        ratio += f" ({spread[0]:.2f}–{spread[1]:.2f})"
    same = f"{c['equal_answers']:.0%}" if "equal_answers" in c else NONE
    if not c["drafts"]:
        return [speed, ratio, "1.00", NONE, NONE, NONE, same]
    accepted = " ".join(f"{a:.2f}".lstrip("0") or "0" for a in c["accepted_at"])
    lengths = [f"{c['tokens_per_step']:.2f}", f"{c['acceptance_length']:.2f}"]
    return [speed, ratio, *lengths, accepted, f"{c['draft_share']:.1%}", same]


def _spec_title(record: Record) -> str:
    s = record["settings"]
    engines = {r["label"]: r["engine"] for r in record["results"] if "engine" in r}
    v1 = [f"`{label}`" for label, e in engines.items() if e["model_runner"] == "v1"]
    runner = "model runner V2" if not v1 else "model runner V1" if len(v1) == len(engines) else ""
    runner = runner or f"model runner V2, V1 under {', '.join(v1)}"
    mode = "eager" if s["eager"] else "CUDA graphs"
    return f"Speculation, {Path(s['model']).name}, greedy, {s['repeats']} repeats ({runner}, {mode})"


def cost_table(record: Record) -> str:
    """ms of a step: a line a context and batch, a column a number of drafts."""
    [result] = record["results"]
    lines = []
    for context, by_batch, spread in zip(result["context"], result["seconds"], result["iqr"]):
        for batch, times, quartiles in zip(result["batch"], by_batch, spread):
            texts = [f"{t * 1e3:.2f} ({a * 1e3:.2f}–{b * 1e3:.2f})" for t, (a, b) in zip(times, quartiles)]
            lines.append([str(batch), str(context), *texts])
    heads = (f"{k} drafts: ms a step (quartiles)" for k in result["drafts"])
    return table(("requests", "tokens each", *heads), lines)


KINDS: dict[str, tuple[Callable[[Record], str], Callable[[Record], str]]] = {
    "bench spec": (_spec_title, spec_table),
    "bench cost-table": (lambda r: f"Step times that `cast` decides by, {r['results'][0]['drafter']}", cost_table),
}
