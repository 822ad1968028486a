"""`vllm-ext eval`: quality of plugins beside dense attention, on any model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ext.cli import shared_options as opt

Repeat = list[str]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("eval")(evaluate)


def evaluate(
    model: Annotated[str, typer.Argument(help="model directory or hub name")],
    task: Annotated[list[str] | None, typer.Option(help="niah, kl, ppl or gen; repeatable")] = None,
    plugins: Annotated[
        list[str] | None,
        typer.Option(help="a row, e.g. 'quest:budget=512,dense_below=0'; repeatable, dense is always first"),
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="prompt tokens of a cell; repeatable [default: 2048]")
    ] = None,
    samples: Annotated[int, typer.Option(help="needles a cell (niah)")] = 20,
    keys: Annotated[int, typer.Option(help="keys with needles; all but one distract (niah)")] = 1,
    values: Annotated[int, typer.Option(help="numbers of the asked key (niah)")] = 1,
    decode_question: Annotated[
        bool, typer.Option("--decode-question", help="feed question and begun answer through decode steps (niah)")
    ] = False,
    chat: Annotated[bool, typer.Option(help="use the chat template (niah)")] = True,
    positions: Annotated[int, typer.Option(help="judged decode positions a text (kl, ppl)")] = 64,
    texts: Annotated[int, typer.Option(help="held-out texts a cell (kl, ppl, gen)")] = 8,
    output: Annotated[int, typer.Option(help="tokens generated behind each text (gen)")] = 1000,
    dtype: opt.ServedDtype = "auto",
    seed: Annotated[int, typer.Option(help="of the needles and of the engine")] = 0,
    batch: Annotated[int, typer.Option(help="requests that run at once")] = 32,
    eager: opt.Eager = False,
    memory: opt.Memory = 0.8,
    kv_memory: opt.KvMemory = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="all engines in one process: faster starts than a fresh process a row")
    ] = False,
    out: Annotated[Path | None, opt.folder_for("eval.json", "eval.png")] = None,
    commit: opt.Commit = None,
) -> None:
    """Needles, divergence from dense, perplexity and free generation, with intervals; the dense row comes first."""
    from vllm_ext.evaluation.engine import check_length, check_model
    from vllm_ext.evaluation.rows import check_prefill, parse_rows
    from vllm_ext.evaluation.settings import Settings

    given: dict[str, Any] = {"keys": keys, "values": values, "decode_question": decode_question, "chat": chat}
    given |= {"positions": positions, "texts": texts, "dtype": dtype, "seed": seed, "batch": batch, "eager": eager}
    settings = Settings(
        model=model,
        tasks=tuple(task or ["niah"]),
        lengths=tuple(length or [2048]),
        samples=samples,
        output=output,
        memory=memory,
        kv_memory=kv_memory,
        **given,
    )
    settings.check()
    rows = parse_rows(plugins or [])
    check_length(check_model(model), settings.longest, "--length")
    check_dtype(dtype)
    for row in rows:
        row.engine_args()  # a wrong plugin or option ends the command before any weight is loaded
    if "gen" in settings.tasks:
        check_prefill(rows)
    settings.check_prompts()
    run(settings, rows, in_process, out, commit)


def check_dtype(dtype: str) -> None:
    """Raise ConfigError for a dtype that vLLM does not know."""
    from vllm_ext.options import ConfigError

    known = ("auto", "bfloat16", "float16", "float32", "half", "float")
    if dtype not in known:
        raise ConfigError(f"--dtype must be one of {', '.join(known)}, got '{dtype}'.")


def run(settings: Any, rows: Any, in_process: bool, out: Path | None, commit: str | None) -> None:
    """Evaluate, saving the record after every row, then print the table and draw the plot."""
    from rich.console import Console

    from vllm_ext import records
    from vllm_ext.evaluation import report
    from vllm_ext.evaluation.run import evaluate as measure

    if out is not None:
        report.check_plots()

    def save(results: list[dict[str, Any]]) -> None:
        if out is not None:
            record = records.record("eval", results, commit=commit, settings=settings.to_json())
            records.save(record, out / "eval.json")

    results = measure(settings, rows, in_process=in_process, on_row=save)
    for table in report.tables(results):
        Console(width=160).print(table)
    if out is not None:
        report.plot(results, out / "eval.png")
        print(f"written: {out / 'eval.json'}, {out / 'eval.png'}")
