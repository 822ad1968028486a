"""`vllm-ext bench spec`: speculation beside stock vLLM on real prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ext.cli import shared_options as opt


def spec(
    model: Annotated[str, typer.Argument(help="directory of the target model")],
    row: Annotated[
        list[str] | None,
        typer.Option(
            help="a row: plugins ('suffix_automaton:num_speculative_tokens=6+hsd') or vLLM's own method "
            "('vllm:ngram_gpu,num_speculative_tokens=4'); repeatable, no speculation is always first"
        ),
    ] = None,
    load: Annotated[list[str] | None, typer.Option(help="edit, summary, chat, agent, mixed; repeatable")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="requests in flight; repeatable [default: 1 8 32]")] = None,
    requests: Annotated[int, typer.Option(help="prompts of a load, at least")] = 16,
    waves: Annotated[int, typer.Option(help="prompts of a load for each request in flight, at least")] = 4,
    output: Annotated[int, typer.Option(help="most tokens of an answer; each has its own, from half of it on")] = 192,
    repeats: Annotated[int, typer.Option(help="times that a load is served; the median counts")] = 3,
    eager: opt.Eager = False,
    kv_memory: Annotated[float, typer.Option(help="GiB of the KV cache of every row")] = 8.0,
    limit: Annotated[
        float, typer.Option(help="seconds of a row, its start included; what would begin later is left out")
    ] = 1800.0,
    out: Annotated[Path | None, opt.folder_for("spec.json")] = None,
    resume: opt.Resume = False,
    commit: opt.Commit = None,
) -> None:
    """Tokens a second, acceptance length and the drafter's share: no speculation and every row, each its own engine."""
    from rich.console import Console
    from rich.table import Table

    from vllm_ext import records
    from vllm_ext.bench.spec import SpecPlan, bench_spec, drafts, engine_args, parse_spec_row

    rows = [parse_spec_row(text) for text in ["none", *(row or [])]]
    for parsed in rows:
        engine_args(parsed.label, parsed.options)  # a wrong plugin or option ends the command before any engine starts
    plan = SpecPlan(
        model=model,
        loads=tuple(load or ("edit", "summary", "chat", "agent")),
        batches=tuple(batch or (1, 8, 32)),
        requests=requests,
        waves=waves,
        output=output,
        repeats=repeats,
        eager=eager,
        kv_memory=kv_memory,
        drafts=tuple(sorted(set().union(*map(drafts, rows)))),
        limit=limit,
    )
    plan.check()
    settings = plan.settings()
    kept = records.kept(out, "spec.json", settings) if resume else []

    def save(results: list[dict[str, Any]]) -> None:
        if out is not None:
            records.save(records.record("bench spec", results, commit=commit, settings=settings), out / "spec.json")

    results = bench_spec(plan, rows, save, kept)
    table = Table(title="speculation, greedy")
    heads = ("row", "load", "batch", "tokens/s", "spread", "ratio", "drafts/step", "accept length", "draft share")
    for name in (*heads, "equal"):
        table.add_column(name, justify="left" if name in ("row", "load") else "right")
    for result in results:
        if "failed" in result:
            table.add_row(result["label"], result["failed"])
        for c in result["cells"]:
            low, high = c["tokens_per_s_range"]
            table.add_row(
                result["label"], c["load"], str(c["batch"]), f"{c['tokens_per_s']:.0f}", f"{low:.0f}–{high:.0f}",
                f"{c['ratio']:.2f}" if "ratio" in c else "–", f"{c['drafted_per_step']:.2f}",
                f"{c['acceptance_length']:.2f}", f"{c['draft_share']:.1%}",
                f"{c['equal_answers']:.0%}" if "equal_answers" in c else "–",
            )  # fmt: skip
    Console(width=150).print(table)
    for result in results:
        for load, batch_size in result.get("skipped", []):
            print(f"{result['label']}, {load}, {batch_size} in flight: not begun within --limit")
        for load, at in result.get("crossover", {}).items():
            where = "pays at every batch" if at is None else f"does not pay from batch {at} on"
            print(f"{result['label']}, {load}: {where}")
