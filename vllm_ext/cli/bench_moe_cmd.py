"""`vllm-ext bench moe`: one expert layer, SonicMoE kernels beside vLLM's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ext.cli import shared_options as opt


def moe(
    shape: Annotated[
        list[str] | None, typer.Option(help="olmoe-1b-7b, qwen3-30b-a3b or mixtral-8x7b; repeatable [default: all]")
    ] = None,
    tokens: opt.Tokens = None,
    tuned: Annotated[
        Path | None, typer.Option(help="folder of `vllm-ext moe tune` [default: the files that come with vLLM]")
    ] = None,
    out: Annotated[Path | None, opt.folder_for("moe.json")] = None,
    commit: opt.Commit = None,
) -> None:
    """One expert layer: the kernels of sonic_moe beside vLLM's, untuned and tuned, and the floor; needs CUDA."""
    from rich.console import Console

    from vllm_ext import records
    from vllm_ext.bench.moe import TOKENS, run, table
    from vllm_ext.moe.shape import SHAPES

    names, counts = shape or list(SHAPES), tokens or list(TOKENS)

    def save(rows: list[dict[str, Any]]) -> None:
        if out is not None:
            settings = {"shapes": names, "tokens": counts, "tuned": tuned is not None}
            records.save(records.record("bench moe", rows, commit=commit, settings=settings), out / "moe.json")

    Console(width=130).print(table(run(names, counts, tuned, save)))
