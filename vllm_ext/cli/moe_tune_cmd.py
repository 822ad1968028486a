"""`vllm-ext moe tune`: tiles of the expert kernels for this GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_ext.cli import shared_options as opt


def register(app: typer.Typer) -> None:
    """Add the command to the group."""
    app.command("tune")(tune)


def tune(
    model: Annotated[str, typer.Argument(help="model directory, or olmoe-1b-7b, qwen3-30b-a3b, mixtral-8x7b")],
    out: Annotated[Path, typer.Option(help="folder of the files")] = Path("moe-tiles"),
    tensor_parallel: Annotated[int, typer.Option(help="ranks that cut each expert; 1 with expert parallelism")] = 1,
    expert_parallel: Annotated[int, typer.Option(help="ranks that share the experts out")] = 1,
    tokens: opt.Tokens = None,
    seconds: Annotated[float, typer.Option(help="time of the search for one number of tokens, about")] = 6.0,
    sonic: Annotated[bool, typer.Option("--sonic", help="also the tiles of sonic_moe")] = False,
    wide: Annotated[bool, typer.Option("--wide", help="with --sonic: search many more tiles")] = False,
) -> None:
    """Find vLLM's tile configuration of the model's experts on this GPU, and write it where vLLM can find it.

    Several minutes; what is finished is kept, so an interrupted run goes on where it was.
    """
    from rich.console import Console

    from vllm_ext.evaluation.progress import bars
    from vllm_ext.moe.checkpoint import check_folder
    from vllm_ext.moe.tune import read_shape, report, tune
    from vllm_ext.options import ConfigError

    if wide and not sonic:
        raise ConfigError("--wide searches tiles of sonic_moe; add --sonic, or leave it out.")
    shape = read_shape(model, tensor_parallel, expert_parallel)
    check_folder(out)
    with bars(str(shape)) as bar:
        result = tune(shape, sorted(set(tokens)) if tokens else None, out, seconds, sonic, bar, wide)
    console = Console(width=120)
    console.print(report(result))
    print(f"written: {result.path}" + (f", {result.sonic_path}" if result.sonic_path else ""))
    print(f"vLLM reads it with VLLM_TUNED_CONFIG_FOLDER={out.resolve()} in its environment.")
    if result.sonic_path:
        print(
            f"sonic_moe reads its table with --additional-config.vllm_ext.sonic_moe.table {result.sonic_path.resolve()}"
        )
