"""The demo's result as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import shorten

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_ext.demo.session import Answer, Question, Result


def number(value: float | None, digits: int = 0) -> str:
    """A number with thousands separators, or "-" for none and NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def _said(answer: Answer) -> Text:
    mark = Text("right: ", style="green") if answer.right else Text("wrong: ", style="red")
    return mark.append(shorten(answer.text, 48, placeholder=" ...") or "(nothing)", style="default")


def answers_table(questions: Sequence[Question], results: Sequence[Result]) -> Table:
    """One row a question, one column a server."""
    table = Table(title="Answers", title_justify="left", show_lines=True)
    for heading in ("question", "expected", *(r.label for r in results)):
        table.add_column(heading, overflow="fold")
    for i, question in enumerate(questions):
        row = [Text(f"{question.label}: {question.text}"), Text(question.expected)]
        table.add_row(*row, *(_said(r.answers[i]) for r in results))
    return table


def figures(questions: Sequence[Question], result: Result) -> dict[str, str]:
    """Row label -> text of the summary table."""
    needles = [a for a, q in zip(result.answers, questions) if q.prompt]
    rates = [a.tokens_per_second for a in needles if not math.isnan(a.tokens_per_second)]
    waits = [a.first_token_seconds for a in needles]
    return {
        "needles found": f"{result.found(questions)} of {len(needles)}",
        "tokens/s after the first, mean of the needles": number(sum(rates) / len(rates) if rates else None, 1),
        "seconds to the first token, mean of the needles": number(sum(waits) / len(waits) if waits else None, 1),
        "attention density (keys read / keys visible)": number(result.metric("attention_density"), 3),
        "KV pages read, over layers and KV heads": number(result.metric("pages_read_total")),
        "sparse steps": number(result.metric("sparse_steps_total")),
        "dense steps": number(result.metric("dense_steps_total")),
        "server start, seconds": number(result.startup_seconds, 0),
    }


def figures_table(questions: Sequence[Question], results: Sequence[Result]) -> Table:
    """The measured figures of each server."""
    table = Table(title="Figures", title_justify="left")
    table.add_column("")
    for result in results:
        table.add_column(result.label, justify="right")
    columns = [figures(questions, r) for r in results]
    for label in columns[0]:
        table.add_row(label, *(c[label] for c in columns))
    return table


def show(console: Console, questions: Sequence[Question], results: Sequence[Result]) -> None:
    """Print the banners, the answers and the figures."""
    for result in results:
        if result.banner:
            console.print("\n".join(result.banner), markup=False, highlight=False, style="dim")
    console.print(answers_table(questions, results))
    console.print(figures_table(questions, results))
