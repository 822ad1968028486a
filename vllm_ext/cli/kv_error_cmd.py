"""`vllm-ext kv-error`: how far eviction moves the output of attention, beside random, recent and oracle choices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ext.cli import shared_options as opt

CONTROLS = ("random_kv", "streaming_llm")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("kv-error")(kv_error)


def kv_error(
    model: Annotated[Path, typer.Argument(help="model directory")],
    plugins: Annotated[list[str] | None, typer.Option(help="a row, e.g. 'snapkv:pool=7'; repeatable")] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(help="share of the prompt kept; repeatable [default: 0.5, 0.2, 0.1, 0.05]")
    ] = None,
    length: Annotated[int, typer.Option(help="tokens of the prompt")] = 2048,
    positions: Annotated[int, typer.Option(help="forced tokens behind the prompt")] = 256,
    texts: Annotated[int, typer.Option(help="held-out texts")] = 4,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    out: Annotated[Path | None, opt.folder_for("kv-error.json")] = None,
    commit: opt.Commit = None,
) -> None:
    """Error of every layer's attention output after eviction; random_kv, streaming_llm and an oracle are added."""
    from rich.console import Console

    from vllm_ext import records
    from vllm_ext.cli.eval_cmd import check_dtype
    from vllm_ext.evaluation import attention_error, corpus
    from vllm_ext.evaluation.progress import bars
    from vllm_ext.options import ConfigError
    from vllm_ext.training.model import load

    check_dtype(dtype)
    if min(length, positions, texts) < 1:
        raise ConfigError("--length, --positions and --texts must be at least 1.")
    ratios = ratio or [0.5, 0.2, 0.1, 0.05]
    if not all(0 < r <= 1 for r in ratios):
        raise ConfigError(f"--ratio must be above 0 and at most 1, got {min(ratios)}.")
    rows = candidates([*CONTROLS, *(plugins or [])], ratios, length)
    attention_error.check_prompt([r.method for r in rows if r.method is not None], length)
    frozen = load(model, device, dtype)
    windows = corpus.windows(frozen.tokenizer, texts, length + positions)
    with bars("kv-error") as advance:
        results = attention_error.measure(frozen, rows, windows, length, advance)
    settings = {"model": str(model), "length": length, "positions": positions, "texts": texts, "ratios": ratios}
    Console(width=160).print(table(results, ratios))
    if out is not None:
        records.save(records.record("kv-error", results, commit=commit, settings=settings), out / "kv-error.json")
        print(f"written: {out / 'kv-error.json'}")


def candidates(texts: list[str], ratios: list[float], length: int) -> list[Any]:
    """A candidate for each row and ratio, then the oracle's.

    Raises:
        ConfigError: not one KV plugin, or a bad option.
    """
    import dataclasses

    from vllm_ext.evaluation.attention_error import ORACLE, Candidate
    from vllm_ext.evaluation.rows import parse_row
    from vllm_ext.options import ConfigError

    found = []
    for text in texts:
        plugins = list(parse_row(text).plugins().values())
        if len(plugins) != 1 or plugins[0].kind != "kv":
            raise ConfigError(f"--plugins '{text}' must be one plugin of kind kv.")
        for ratio in ratios:
            method = plugins[0]
            block, least = method.block_size, method.sinks + method.window
            blocks = max(-(-least // block), round(ratio * length / block))
            given = {"budget": blocks * block} if method.budget else {"ratio": ratio}
            found.append(Candidate(text, dataclasses.replace(method, **given), ratio))
    return found + [Candidate(ORACLE, None, r) for r in ratios]


def table(results: list[dict[str, Any]], ratios: list[float]) -> Any:
    """Mean error and 95th percentile: a row a method, a column a ratio."""
    from rich.table import Table

    shown = Table(title="relative error of attention outputs: mean (95th percentile)")
    shown.add_column("method")
    for ratio in ratios:
        shown.add_column(f"{ratio:.0%} kept", justify="right")
    for label in dict.fromkeys(r["label"] for r in results):
        cells = [next(r for r in results if (r["label"], r["ratio"]) == (label, x)) for x in ratios]
        shown.add_row(label, *(f"{c['mean']:.3f} ({c['p95']:.3f})" for c in cells))
    return shown
