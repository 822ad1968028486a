"""The records of `vllm-ext train seer` and `vllm-ext train lychee` as Markdown tables; part of `results.KINDS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_ext.markdown import table

Record = dict[str, Any]


def seer_table(record: Record) -> str:
    """What a run cost, and how much attention mass its gates find in held-out text."""
    found = record["results"]
    s, before, after = found["settings"], found["held_out"]["before"], found["held_out"]["after"]
    cost = [str(s["steps"]), f"{s['steps'] * s['batch'] * s['window'] / 1e6:.0f} M", f"{found['seconds']:.0f}"]
    mass = [f"{after[k]:.1%}" for k in ("gate", "best", "mean_key")]
    rows = [[*cost, f"{before['kl']:.2f}", f"{after['kl']:.2f}", *mass]]
    head = ("steps", "tokens seen", "seconds", "KL before", "after", "mass of the gate's pages", "of the best pages")
    return table((*head, "of mean-key pages"), rows)


def lychee_table(record: Record) -> str:
    """What a run cost, how many heads it chose, and their error beside as many random ones."""
    found = record["results"]
    s, error = found["settings"], found["held_out"]
    heads = f"{found['retrieval_heads']} of {s['model']['layers'] * s['model']['kv_heads']}"
    errors = [f"{error[k]:.3f}" for k in ("trained", "random", "first_layer_only")]
    rows = [[str(s["steps"]), f"{found['seconds']:.0f}", heads, f"{s['keep']:.0%}", *errors]]
    head = ("steps", "seconds", "retrieval heads", "pages of the others", "relative error of the last hidden state")
    return table((*head, "with random roles", "with the first layer's heads alone"), rows)


KINDS: dict[str, tuple[Callable[[Record], str], Callable[[Record], str]]] = {
    "train seer": (lambda r: f"Gates of seer, {r['results']['settings']['budget']} pages judged", seer_table),
    "train lychee": (lambda r: "Head roles of lychee", lychee_table),
}
