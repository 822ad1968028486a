"""`vllm-ext train seer`: gates of SeerAttention-R for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command("seer")(seer)


def seer(
    model: Annotated[Path, typer.Option(help="model directory")],
    out: Annotated[Path, typer.Option(help="file to write: gates.safetensors")],
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text, plain or .gz; repeatable [default: shipped prose]")
    ] = None,
    steps: Annotated[int, typer.Option(help="training steps")] = 800,
    window: Annotated[int, typer.Option(help="tokens a window")] = 4096,
    batch: Annotated[int, typer.Option(help="windows a step")] = 4,
    rows: Annotated[int, typer.Option(help="queries compared in a window")] = 512,
    page_size: Annotated[int, typer.Option(help="tokens a page: the plugin's page_size")] = 64,
    width: Annotated[int | None, typer.Option(help="channels of a gate [default: the head size]")] = None,
    lr: Annotated[float, typer.Option(help="highest learning rate")] = 1e-3,
    passkeys: Annotated[float, typer.Option(help="share of windows with passkeys to find")] = 0.25,
    seed: Annotated[int, typer.Option(help="of windows, queries and the gates' start")] = 0,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
    dtype: Annotated[str, typer.Option(help="of the model: auto, bfloat16 or float32")] = "auto",
    restart: Annotated[
        bool, typer.Option("--restart", help="drop an interrupted run instead of going on with it")
    ] = False,
    commit: Annotated[str | None, typer.Option(help="commit to record where git is not at hand")] = None,
) -> None:
    """Train SeerAttention-R gates by self-distillation; an interrupted run goes on where it stopped.

    Writes OUT, and beside it OUT.json: settings, losses, and how much attention mass the gates find in held-out text.
    """
    from vllm_ext.training import launch
    from vllm_ext.training import seer as training

    settings = training.Settings(steps, batch, window, rows, page_size, width, lr, passkeys=passkeys, seed=seed)
    settings.check()
    launch.run("train seer", training.train, settings, model, out, text or [], device, dtype, restart, commit)
