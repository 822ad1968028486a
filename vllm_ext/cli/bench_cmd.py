"""`vllm-ext bench`: speed of plugins beside stock vLLM (`decode`), and of single kernels (`kernels`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ext.cli import bench_cost_cmd, bench_spec_cmd
from vllm_ext.cli import shared_options as opt
from vllm_ext.options import ConfigError


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    from vllm_ext.cli.bench_moe_cmd import moe
    from vllm_ext.cli.bench_routers_cmd import routers
    from vllm_ext.cli.bench_serving_cmd import serving, serving_plot

    bench = typer.Typer(help="Speed beside stock vLLM, with spread and the byte floor.", no_args_is_help=True)
    bench.command("decode")(decode)
    bench.command("kernels")(kernels)
    bench.command("kv-kernels")(kv_kernels)
    bench.command("spec")(bench_spec_cmd.spec)
    bench.command("cost-table")(bench_cost_cmd.cost_table)
    bench.command("verify")(bench_cost_cmd.verify)
    bench.command("moe")(moe)
    bench.command("routers")(routers)
    bench.command("serving")(serving)
    bench.command("serving-plot")(serving_plot)
    app.add_typer(bench, name="bench")


def decode(
    shape: Annotated[
        str, typer.Option(help="llama-3.1-8b, qwen3-8b, qwen2.5-1.5b, smollm2, olmoe-1b-7b, qwen3-30b-a3b or tiny")
    ],
    case: Annotated[list[str], typer.Option(help="BATCHxCONTEXT, e.g. 8x32768; repeatable")],
    plugins: Annotated[
        list[str] | None, typer.Option(help="a row, e.g. 'quest:budget=4096'; repeatable, dense is always first")
    ] = None,
    steps: Annotated[int, typer.Option(help="timed decode steps a repeat")] = 64,
    repeats: Annotated[int, typer.Option(help="consecutive windows of that many steps")] = 5,
    warmup: Annotated[int, typer.Option(help="decode steps before the first window")] = 16,
    eager: opt.Eager = False,
    memory: opt.Memory = 0.9,
    stock_block_size: Annotated[
        int | None, typer.Option(help="block size of the dense row [default: vLLM's own]")
    ] = None,
    peaked: Annotated[
        float | None,
        typer.Option(
            help="synthetic keys whose logits have this standard deviation, for methods that adapt; "
            "prompts then cost little [default: the model's own keys]"
        ),
    ] = None,
    out: Annotated[Path | None, opt.folder_for("decode.json", "decode.png")] = None,
    resume: opt.Resume = False,
    commit: opt.Commit = None,
) -> None:
    """Time per output token of whole decode batches on dummy weights: dense and every plugin row, a process each."""
    from rich.console import Console

    from vllm_ext import records
    from vllm_ext.bench import report
    from vllm_ext.bench.decode import Plan, bench_rows, parse_case
    from vllm_ext.bench.shapes import load_shape
    from vllm_ext.evaluation.report import check_plots
    from vllm_ext.evaluation.rows import parse_rows

    plan = Plan(
        load_shape(shape),
        tuple(parse_case(c) for c in case),
        steps=steps,
        repeats=repeats,
        warmup=warmup,
        eager=eager,
        memory=memory,
        stock_block_size=stock_block_size,
        logit_std=peaked,
    )
    plan.check()
    rows = parse_rows(plugins or [])
    for row in rows:
        row.engine_args()  # a wrong plugin or option ends the command before any engine starts
    if out is not None:
        check_plots()

    settings = {"shape": shape, "cases": case, "steps": steps, "repeats": repeats, "eager": eager}
    settings |= {"memory": memory, "stock_block_size": stock_block_size, "peaked": peaked}
    kept = records.kept(out, "decode.json", settings) if resume else []

    def save(results: list[dict[str, Any]]) -> None:
        if out is not None:
            records.save(records.record("bench decode", results, commit=commit, settings=settings), out / "decode.json")

    results = bench_rows(plan, rows, save, kept)
    Console(width=160).print(report.decode_table(results))
    if out is not None:
        report.decode_plot(results, out / "decode.png")
        print(f"written: {out / 'decode.json'}, {out / 'decode.png'}")


def kernels(
    case: Annotated[
        list[str] | None, typer.Option(help="BATCHxCONTEXT; repeatable [default: 8x32768 32x32768 4x131072]")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="kernels to time; repeatable [default: all]")] = None,
    budget: Annotated[int, typer.Option(help="keys read by a sparse step")] = 4096,
    out: Annotated[Path | None, opt.folder_for("kernels.json")] = None,
    commit: opt.Commit = None,
) -> None:
    """Each kernel against its byte floor, beside dense FlashAttention 3 and FlashInfer; needs CUDA."""
    from rich.console import Console

    from vllm_ext import records
    from vllm_ext.bench import report
    from vllm_ext.bench.decode import parse_case
    from vllm_ext.bench.kernels import run

    def save(results: list[dict[str, Any]]) -> None:
        if out is not None:
            record = records.record("bench kernels", results, commit=commit, settings={"budget": budget})
            records.save(record, out / "kernels.json")

    cases = [parse_case(c) for c in case or ["8x32768", "32x32768", "4x131072"]]
    results = run(cases, only or None, budget, save)
    Console(width=140).print(report.kernel_table(results))
    if failed := [r["case"] for r in results if "failed" in r]:
        raise ConfigError(f"--case {', '.join(failed)} failed; the table names the kernel and the reason.")


def kv_kernels(
    out: Annotated[Path | None, opt.folder_for("kv-kernels.json")] = None,
    commit: opt.Commit = None,
) -> None:
    """Each kernel of the eviction engine against its floor, and r_kv's whole evictions; needs CUDA."""
    from rich.console import Console
    from rich.markdown import Markdown

    from vllm_ext import records
    from vllm_ext.bench.kv_kernels import run
    from vllm_ext.results_kv import kv_kernel_table

    record = records.record("bench kv kernels", run(), commit=commit)
    Console(width=140).print(Markdown(kv_kernel_table(record)))
    if out is not None:
        records.save(record, out / "kv-kernels.json")
