"""`vllm-ext bench serving`: loads of requests on a fixed KV pool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ext.cli import shared_options as opt


def serving(
    shape: Annotated[str, typer.Option(help="llama-3.1-8b, qwen3-8b, qwen2.5-1.5b, smollm2 or tiny")],
    load: Annotated[list[str], typer.Option(help="REQUESTSxPROMPT+OUTPUT, e.g. 64x16384+512; repeatable")],
    pool: Annotated[float, typer.Option(help="stock requests of the first load that the KV pool holds")] = 10,
    row: Annotated[
        list[str] | None,
        typer.Option(help="plugins ('snapkv:ratio=0.2') or stock arguments ('vllm:kv_cache_dtype=fp8'); repeatable"),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="requests a second [default: all at once]")] = None,
    seqs: Annotated[int, typer.Option(help="max_num_seqs")] = 256,
    compiled: Annotated[bool, typer.Option("--compiled", help="torch.compile [default: decode graphs alone]")] = False,
    eager: opt.Eager = False,
    out: Annotated[Path | None, opt.folder_for("serving.json")] = None,
    resume: opt.Resume = False,
    commit: opt.Commit = None,
) -> None:
    """Throughput, concurrency and latencies on dummy weights and equal bytes of KV cache, each row its own engine."""
    from rich.console import Console

    from vllm_ext import records
    from vllm_ext.bench.serving import (
        ServingPlan,
        ServingRow,
        bench_serving,
        parse_load,
        parse_serving_row,
        serving_table,
    )
    from vllm_ext.bench.shapes import load_shape
    from vllm_ext.evaluation.rows import Row

    loads = tuple(parse_load(text) for text in load)
    plan = ServingPlan(load_shape(shape), loads, pool, rate, seqs, compiled, eager)
    plan.check()
    rows = [ServingRow(Row()), *(parse_serving_row(text) for text in row or [])]
    for parsed in rows:
        parsed.row.engine_args()  # a wrong plugin or option ends the command before any engine starts

    settings = {"shape": shape, "loads": load, "pool": pool, "rate": rate, "seqs": seqs, "compiled": compiled}
    settings |= {"eager": eager}
    kept = records.kept(out, "serving.json", settings) if resume else []

    def save(results: list[dict[str, Any]]) -> None:
        if out is not None:
            record = records.record("bench serving", results, commit=commit, settings=settings)
            records.save(record, out / "serving.json")

    Console(width=170).print(serving_table(bench_serving(plan, rows, save, kept)))
    if out is not None:
        print(f"written: {out / 'serving.json'}; draw it with `vllm-ext bench serving-plot`")


def serving_plot(
    records: Annotated[list[Path], typer.Argument(help="serving.json files, e.g. of several loads or pools")],
    out: Annotated[Path, typer.Option(help="file to write, a .png")],
) -> None:
    """One plot of several records of `bench serving`: throughput over stock against load, and blocks over time."""
    from vllm_ext.bench.serving_plot import plot, read
    from vllm_ext.evaluation.report import check_plots

    check_plots()
    plot(read(records), out)
    print(f"written: {out}")
