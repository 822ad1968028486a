"""`vllm-ext bench cost-table` and `vllm-ext bench verify`: what speculation costs on this device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ext.cli import shared_options as opt


def cost_table(
    model: Annotated[str, typer.Argument(help="directory of the target model")],
    out: Annotated[Path, typer.Option(help="file to write, for cast.table")],
    drafter: Annotated[str, typer.Option(help="the drafter that will be served, e.g. 'draft_model:model=DIR'")] = (
        "suffix_automaton"
    ),
    batch: Annotated[list[int] | None, typer.Option(help="requests; repeatable [default: 1 2 4 8 16 32]")] = None,
    drafts: Annotated[list[int] | None, typer.Option(help="drafts a request; repeatable [default: 0 2 4 7]")] = None,
    context: Annotated[list[int] | None, typer.Option(help="tokens a request; repeatable [default: 512]")] = None,
    steps: Annotated[int, typer.Option(help="timed steps of a cell", min=2)] = 16,
    eager: opt.Eager = False,
    kv_memory: Annotated[float, typer.Option(help="GiB of the KV cache", min=0.01)] = 8.0,
    commit: opt.Commit = None,
) -> None:
    """Measure the step times that the length policy `cast` decides by."""
    from rich.console import Console
    from rich.table import Table

    from vllm_ext import records
    from vllm_ext.bench.cost_table import CostPlan, measure
    from vllm_ext.evaluation.engine import check_model
    from vllm_ext.evaluation.progress import bars

    check_model(model)
    axes = {"batches": batch, "drafts": drafts, "contexts": context}
    given: dict[str, Any] = {name: tuple(axis) for name, axis in axes.items() if axis}
    plan = CostPlan(model, drafter, steps=steps, eager=eager, kv_memory=kv_memory, **given)
    plan.row()
    with bars("cost table") as advance:
        result = measure(plan, advance)
    records.save(records.record("bench cost-table", [result], commit=commit), out)
    table = Table(title="ms a step")
    for name in ("context", "batch", *(f"{k} drafts" for k in plan.drafts)):
        table.add_column(name, justify="right")
    for c, by_batch in zip(plan.contexts, result["seconds"]):
        for b, times in zip(plan.batches, by_batch):
            table.add_row(str(c), str(b), *(f"{1e3 * t:.2f}" for t in times))
    Console(width=120).print(table)
    print(f"written: {out}")


def verify(
    vocab: Annotated[int, typer.Option(help="tokens of the vocabulary", min=2)] = 151936,
    batch: Annotated[list[int] | None, typer.Option(help="requests; repeatable [default: 1 8 32]")] = None,
    drafts: Annotated[int, typer.Option(help="drafts a request", min=1, max=31)] = 8,
    out: Annotated[Path | None, opt.folder_for("verify.json")] = None,
    commit: opt.Commit = None,
) -> None:
    """Microseconds of every verification rule beside vLLM's own kernels; needs CUDA."""
    from rich.console import Console
    from rich.table import Table

    from vllm_ext import records
    from vllm_ext.bench.verify import run

    results = run(tuple(batch or (1, 8, 32)), drafts, vocab)
    if out is not None:
        settings = {"vocab": vocab, "drafts": drafts}
        records.save(records.record("bench verify", results, commit=commit, settings=settings), out / "verify.json")
    table = Table(title=f"{drafts} drafts, {vocab} tokens")
    for name in ("batch", "drafts are", "rule", "us on the device", "us launching", "byte floor, us"):
        table.add_column(name, justify="left" if name in ("rule", "drafts are") else "right")
    for r in results:
        kind = "sampled" if r["sampled"] else "given"
        numbers = (f"{r[name]:.1f}" for name in ("device_us", "host_us", "floor_us"))
        table.add_row(str(r["batch"]), kind, r["rule"], *numbers)
    Console(width=100).print(table)
