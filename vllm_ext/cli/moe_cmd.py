"""`vllm-ext moe`: routing reports, expert merging, comparing and upcycling; tuned tiles are in moe_tune_cmd.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ext.cli import shared_options as opt


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    moe = typer.Typer(help="Mixture-of-experts models: routing, merging, tuning.", no_args_is_help=True)
    moe.command("report")(report)
    moe.command("merge")(merge)
    moe.command("compare")(compare)
    moe.command("upcycle")(upcycle)
    if importlib.util.find_spec("vllm_ext.cli.moe_tune_cmd"):
        importlib.import_module("vllm_ext.cli.moe_tune_cmd").register(moe)
    app.add_typer(moe, name="moe")


def report(
    trace: Annotated[Path, typer.Argument(help="file that --plugins moe_trace has written")],
    model: Annotated[Path | None, typer.Option(help="the traced model's directory: checks it, adds bytes")] = None,
    target: Annotated[float, typer.Option(help="hit rate that an expert cache must reach")] = 0.9,
    segments: Annotated[int, typer.Option(help="most segments of 512 tokens in the cache simulations")] = 64,
    out: Annotated[Path | None, opt.folder_for("moe-report.json", "moe-report.png")] = None,
    commit: opt.Commit = None,
) -> None:
    """Expert load, imbalance, local routing consistency (SRP, SCH) and the expert cache that a trace asks for."""
    from rich.console import Console

    from vllm_ext import records
    from vllm_ext.evaluation.report import check_plots
    from vllm_ext.moe import report as reports
    from vllm_ext.moe import trace_file
    from vllm_ext.moe.checkpoint import Checkpoint, check_folder

    found = trace_file.load(trace)
    size = None
    if model is not None:
        given = Checkpoint(model)
        trace_file.check_model(found, trace, given.num_experts, given.top_k, given.layers, model.name)
        size = reports.expert_bytes(given.config, given.layout.width)
    if out is not None:
        check_folder(out)
        check_plots()
    results = reports.analyse(found, target=target, segments=segments)
    results["expert_bytes"] = size
    console = Console(width=160)
    for table in reports.tables(results):
        console.print(table)
    print(reports.verdict(results) + reports.cache_text(results))
    if out is not None:
        records.save(records.record("moe report", results, commit=commit), out / "moe-report.json")
        reports.plot(results, out / "moe-report.png")
        print(f"written: {out / 'moe-report.json'}, {out / 'moe-report.png'}")


def merge(
    model: Annotated[Path, typer.Argument(help="MoE model directory (Mixtral, Qwen3-MoE, OLMoE)")],
    out: Annotated[Path, typer.Argument(help="directory to make")],
    experts: Annotated[int, typer.Option(help="experts of the merged model")],
    method: Annotated[str, typer.Option(help="nash, camex, mean or drop")] = "nash",
    trace: Annotated[
        Path | None, typer.Option(help="trace of this model: tells which experts are used (camex, drop, the base)")
    ] = None,
    step: Annotated[float, typer.Option(help="nash, camex: length of the step; 1 is as far as a mean goes")] = 1.0,
    align: Annotated[bool, typer.Option(help="match the neurons of experts before they are averaged")] = True,
    seed: Annotated[int, typer.Option(help="of the probe inputs")] = 0,
    device: Annotated[str, typer.Option(help="where to match neurons: auto, cuda or cpu")] = "auto",
) -> None:
    """Merge the experts of a model into fewer and write a checkpoint that stock vLLM loads."""
    from vllm_ext.evaluation.progress import bars
    from vllm_ext.moe.merge import Plan, merge_checkpoint
    from vllm_ext.training.model import pick_device

    plan, place = Plan(experts=experts, method=method, step=step, align=align, seed=seed), pick_device(device)
    with bars("merge") as advance:
        summary = merge_checkpoint(model, out, plan, trace, lambda done, total: advance("layers", done, total), place)
    print(summary.text())


def compare(
    models: Annotated[list[Path], typer.Argument(help="model directories; the first is the reference")],
    length: Annotated[int, typer.Option(help="context tokens before the judged positions")] = 512,
    positions: Annotated[int, typer.Option(help="judged decode positions a text")] = 64,
    texts: Annotated[int, typer.Option(help="held-out texts")] = 8,
    dtype: opt.ServedDtype = "auto",
    eager: opt.Eager = False,
    memory: opt.Memory = 0.8,
    kv_memory: opt.KvMemory = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="all engines in one process")] = False,
    out: Annotated[Path | None, opt.folder_for("moe-compare.json")] = None,
    commit: opt.Commit = None,
) -> None:
    """Perplexity and divergence of models beside the first, e.g. of merged ones beside their origin."""
    from rich.console import Console

    from vllm_ext import records
    from vllm_ext.cli.eval_cmd import check_dtype
    from vllm_ext.evaluation.report import tables
    from vllm_ext.evaluation.settings import Settings
    from vllm_ext.moe.checkpoint import check_folder
    from vllm_ext.moe.compare import compare as measure

    check_dtype(dtype)
    if out is not None:
        check_folder(out)
    given: dict[str, Any] = {"texts": texts, "positions": positions, "dtype": dtype, "eager": eager, "memory": memory}
    given["kv_memory"] = kv_memory
    settings = Settings(model=str(models[0]), tasks=("kl", "ppl"), lengths=(length,), **given)

    def save(results: list[dict[str, Any]]) -> None:
        if out is not None:
            record = records.record("moe compare", results, commit=commit, settings=settings.to_json())
            records.save(record, out / "moe-compare.json")

    results = measure(models, settings, in_process=in_process, on_row=save)
    for table in tables(results):
        Console(width=160).print(table)


def upcycle(
    dense: Annotated[Path, typer.Argument(help="directory of a dense Llama, e.g. of `vllm-ext model smollm2`")],
    out: Annotated[Path, typer.Argument(help="directory to make")],
    experts: Annotated[int, typer.Option(help="copies of each MLP")] = 8,
    top_k: Annotated[int, typer.Option(help="experts a token")] = 2,
    noise: Annotated[float, typer.Option(help="noise on the copies, in standard deviations of each matrix")] = 0.0,
    router: Annotated[float, typer.Option(help="standard deviation of the gate weights")] = 0.02,
    seed: Annotated[int, typer.Option(help="of gates, noise and windows")] = 0,
    steps: Annotated[
        int, typer.Option(help="steps of continued training, in which the experts part ways; 0 = none")
    ] = 0,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text to train on; repeatable [default: shipped prose]")
    ] = None,
    window: Annotated[int, typer.Option(help="training: tokens a window")] = 1024,
    batch: Annotated[int, typer.Option(help="training: windows a step")] = 16,
    lr: Annotated[float, typer.Option(help="training: highest learning rate")] = 3e-4,
    device: Annotated[str, typer.Option(help="training: auto, cuda or cpu")] = "auto",
    commit: opt.Commit = None,
) -> None:
    """Write a Mixtral whose experts are copies of a Llama's MLPs, trained if asked to: an MoE model for tests."""
    from vllm_ext import records
    from vllm_ext.moe import models

    start: dict[str, Any] = {"experts": experts, "top_k": top_k, "noise": noise, "router": router, "seed": seed}
    if not steps:
        print(models.upcycle(dense, out, **start))
        return
    from vllm_ext.training import launch
    from vllm_ext.training import text as texts
    from vllm_ext.training import upcycle as training
    from vllm_ext.training.model import pick_device

    settings = training.Settings(**start, steps=steps, window=window, batch=batch, lr=lr)
    checkpoint = launch.checkpoint_of(out)
    results = training.train(dense, texts.read(text or []), out, settings, checkpoint, pick_device(device))
    records.save(records.record("moe upcycle", results, commit=commit), out.with_name(out.name + ".json"))
    print(out)
