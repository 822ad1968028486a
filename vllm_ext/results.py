"""The records under docs/results as Markdown tables; a measurement that has no record has no table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_ext import results_kv, results_moe, results_spec, results_training
from vllm_ext.markdown import table
from vllm_ext.options import ConfigError

Record = dict[str, Any]
NONE = "–"
_LOCAL = ("--out", "--commit")
"""Options of a command line that say where the record went, not what was measured."""


def tables(folder: Path, root: Path) -> str:
    """Every record below `folder`, in the order of `KINDS` and then by name; "" if there is none.

    Args:
        folder: where the records are; other JSON files may lie there too.
        root: links to the records are relative to this.

    Raises:
        ConfigError: a record that cannot be read or lacks what its table shows.
    """
    found = [(path, _read(path)) for path in sorted(folder.rglob("*.json"))]
    parts = []
    for command, (title, make) in KINDS.items():
        for path, record in found:
            if record.get("command") == command:
                try:
                    parts.append(f"{_caption(title(record), record, path, root)}\n\n{make(record)}")
                except (KeyError, TypeError, ValueError) as error:
                    raise ConfigError(f"{path} is no record of `vllm-ext {command}` ({error!r}); remove it.") from None
    return "\n\n".join(parts)


def _read(path: Path) -> Record:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable JSON ({error}); correct or remove it.") from None
    return data if isinstance(data, dict) else {}


def _caption(title: str, record: Record, path: Path, root: Path) -> str:
    """Heading, device, versions, record file with its plot if there is one, and command."""
    files = [path, *(p for p in (path.with_suffix(".png"),) if p.is_file())]
    links = ", ".join(f"[{p.name}]({p.relative_to(root).as_posix()})" for p in files)
    versions = ", ".join(f"{n} {record['versions'][n]}" for n in ("vllm", "torch", "triton") if record["versions"][n])
    commit = f", commit `{_commit(record['commit'])}`" if record.get("commit") else ""
    made = f"\nMade by `{command_line(record['argv'])}`." if "argv" in record else ""
    note = f"\nNote: {record['note']}." if record.get("note") else ""
    return f"#### {title}\n\n{record['device']}; {versions}{commit}. Record: {links}.{made}{note}"


def _commit(text: str) -> str:
    head, plus, state = text.partition("+")
    return head[:10] + plus + state


def command_line(argv: Sequence[str]) -> str:
    """The command that made a record, without output paths; of a local path only the last part is kept."""
    words, skip = ["vllm-ext"], False
    for word in argv:
        name, equals, _ = word.partition("=")
        if skip or name in _LOCAL:
            skip = not skip and not equals
            continue
        words.append(f"DIR/{Path(word).name}" if word.startswith(("/", "~")) else word)
    return shlex.join(words)


# ------------------------------------------------------------------------------------------- bench decode
def _decode_title(record: Record) -> str:
    engine = record["results"][-1]["engine"]
    facts = [f"model runner {engine['model_runner']}", f"graphs {str(engine['cudagraph_mode']).rpartition('.')[2]}"]
    facts += ["async scheduling"] if engine["async_scheduling"] else []
    spread = record["settings"].get("peaked")
    facts += [f"synthetic keys, standard deviation of the logits {spread:g}"] if spread else []
    return f"Decode step, {record['settings']['shape']} shape, dummy weights ({', '.join(facts)})"


def decode_table(record: Record) -> str:
    """One line for each case and plugin row, beside the stock row of the same run."""
    stock, *others = record["results"]
    rows = []
    counted = any("read" in c for r in others for c in r["cells"])
    for case in dict.fromkeys(c["case"] for r in record["results"] for c in r["cells"]):
        dense = _cell(stock, case)
        for result in others or [{"label": NONE, "cells": []}]:
            cell = _cell(result, case)
            read = [f"{cell['read']['bytes']:.1%}" if "read" in cell else NONE] if counted else []
            rows.append([case, *_stock_cells(dense), _code(result["label"]), *_plugin_cells(cell), *read])
    head = (
        "batch x context",
        "stock, ms a token",
        "of its byte floor",
        "plugin",
        "ms a token (quartiles of the steps)",
    )
    more = ["faster by", "of its byte floor", "steps in graphs", *(["bytes read"] if counted else [])]
    return table([*head, *more], rows)


def _cell(result: Record, case: str) -> Record:
    return next((c for c in result["cells"] if c["case"] == case), {})


def _stock_cells(cell: Record) -> list[str]:
    if "tpot_s" not in cell:
        return [cell.get("skipped", NONE), NONE]
    return [f"{cell['tpot_s'] * 1e3:.2f}", f"{cell['floor_fraction']:.0%}"]


def _plugin_cells(cell: Record) -> list[str]:
    if "tpot_s" not in cell:
        return [cell.get("skipped", NONE), NONE, NONE, NONE]
    low, high = cell["step_iqr_s"]
    modes = ", ".join(f"{mode} {n} of {cell['steps']}" for mode, n in sorted(cell["graph_modes"].items()))
    ratio = NONE if cell["ratio"] is None else f"{cell['ratio']:.2f}x"
    time = f"{cell['tpot_s'] * 1e3:.2f} ({low * 1e3:.2f}–{high * 1e3:.2f})"
    return [time, ratio, f"{cell['floor_fraction']:.0%}", modes or "none"]


# ------------------------------------------------------------------------------------------- bench kernels
def _kernel_title(record: Record) -> str:
    return f"Kernels, one layer of Llama-3.1-8B, budget {record['settings']['budget']} (CUDA graph replays, medians)"


def kernel_table(record: Record) -> str:
    """One line for each case and kernel."""
    fa3 = {r["case"]: r["time_s"] for r in record["results"] if r["kernel"].startswith("fa3") and "time_s" in r}
    rows = [[r["case"], r["kernel"], *_kernel_cells(r, fa3.get(r["case"]))] for r in record["results"]]
    head = (
        "batch x context",
        "kernel",
        "us",
        "byte floor, us",
        "of the floor",
        "FA3 / this",
        "faster dense kernel / this",
    )
    return table(head, rows)


def _kernel_cells(row: Record, fa3: float | None) -> list[str]:
    if "skipped" in row:
        return [row["skipped"], NONE, NONE, NONE, NONE]
    floor = [f"{row['floor_s'] * 1e6:.1f}", f"{row['floor_s'] / row['time_s']:.0%}"] if row["floor_s"] else [NONE] * 2
    dense = row.get("vs_dense")  # absent where a comparison means nothing
    ratios = [f"{fa3 / row['time_s']:.2f}x" if fa3 and dense else NONE, f"{dense:.2f}x" if dense else NONE]
    return [f"{row['time_s'] * 1e6:.1f}", *floor, *ratios]


# ------------------------------------------------------------------------------------------- eval
def _quality_title(record: Record) -> str:
    return f"Quality, {Path(record['settings']['model']).name} (95 % intervals)"


def quality_table(record: Record) -> str:
    """One line for each row and length; the columns of the tasks that were run, and what was read; notes below."""
    tasks = [t for t in _TASKS if any(r.get(t) for r in record["results"])]
    reads = any(_bytes_read(r) for r in record["results"])
    rows, notes = [], [text for task, text in _NOTES.items() if task in tasks or (task == "read" and reads)]
    for result in record["results"]:
        for length in sorted({c["length"] for t in tasks for c in result.get(t, [])}):
            cells = [c for t in tasks for c in _task_cells(result, t, length)]
            cells += [_bytes_read(result, length) or NONE] * reads
            rows.append([_code(result["label"]), str(length), *cells])
        notes += [f"* {_code(result['label'])}: {note}" for note in result.get("notes", [])]
    titles = [*(title for t in tasks for title in _TASKS[t][0]), *["bytes read"] * reads]
    text = table(("row", "tokens", *titles), rows)
    return "\n\n".join([text, "\n".join(notes)] if notes else [text])


def _task_cells(result: Record, task: str, length: int) -> list[str]:
    titles, make = _TASKS[task]
    found = [c for c in result.get(task, []) if c["length"] == length]
    return make(found[0]) if found else [NONE] * len(titles)


def _bytes_read(result: Record, length: int | None = None) -> str:
    """Bytes that decode steps read relative to dense: "25.1%", or apart for tasks that differ; "" if not counted."""
    found: dict[str, list[str]] = {}
    for task in _TASKS:
        for c in result.get(task, []):
            if length in (None, c["length"]) and "read" in c:
                found.setdefault(f"{c['read']['bytes']:.1%}", []).append(task)
    return ", ".join(text if len(found) == 1 else f"{text} ({', '.join(t)})" for text, t in found.items())


def _niah_cells(c: Record) -> list[str]:
    return [f"{c['accuracy']:.0%} of {c['samples']} ({c['low']:.0%}–{c['high']:.0%})"]


def _kl_cells(c: Record) -> list[str]:
    return [
        f"{c['mean']:.4f} ({c['low']:.4f}–{c['high']:.4f})",
        f"{c['agree']:.1%} ({c['agree_low']:.1%}–{c['agree_high']:.1%})",
    ]


def _ppl_cells(c: Record) -> list[str]:
    return [f"{c['ppl']:.3f}", _more(c)]


def _more(c: Record) -> str:
    return f"{c['nll_more']:+.4f} ({c['nll_more_low']:+.4f}–{c['nll_more_high']:+.4f})" if "nll_more" in c else NONE


def _gen_cells(c: Record) -> list[str]:
    kl = f"{c['kl']:.4f} ({c['kl_low']:.4f}–{c['kl_high']:.4f})" if "kl" in c else NONE
    return [f"{c['nll']:.4f}", _more(c), kl, f"{c['distinct']:.1%} ({c['distinct_low']:.1%}–{c['distinct_high']:.1%})"]


_TASKS: dict[str, tuple[tuple[str, ...], Callable[[Record], list[str]]]] = {
    "niah": (("needles found",), _niah_cells),
    "kl": (("mean KL to dense, nats", "same top token"), _kl_cells),
    "ppl": (("perplexity", "NLL over dense, nats"), _ppl_cells),
    "gen": (("NLL of own text, nats", "over dense's", "KL to dense on it", "distinct 4-grams"), _gen_cells),
}
_NOTES = {
    "gen": (
        "* own text: generated behind the tokens at temperature 1, then judged by full attention; its NLL is H(q, p), "
        "over dense's H(q, p) - H(p); KL(q || p) a token"
    ),
    "read": (
        "* bytes read: keys, values and index of the decode steps relative to dense, over all layers that see the "
        "whole context"
    ),
}
"""What columns mean: task, or "read", -> a line below the table."""


def _code(text: str) -> str:
    return text if text == NONE or text.startswith("dense") else f"`{text}`"


KINDS: dict[str, tuple[Callable[[Record], str], Callable[[Record], str]]] = {
    "bench decode": (_decode_title, decode_table),
    "bench kernels": (_kernel_title, kernel_table),
    "eval": (_quality_title, quality_table),
    **results_kv.KINDS,
    **results_moe.KINDS,
    **results_spec.KINDS,
    **results_training.KINDS,
}
"""Command of a record -> (title, table); the order of the document."""
