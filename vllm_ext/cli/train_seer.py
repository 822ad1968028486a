"""`vllm-ext train seer`: gates of SeerAttention-R for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_ext.cli import shared_options as opt


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command("seer")(seer)


def seer(
    model: opt.Model,
    out: Annotated[Path, opt.file_to_write("gates.safetensors")],
    text: opt.Text = None,
    steps: opt.Steps = 800,
    window: opt.Window = 4096,
    batch: opt.Batch = 4,
    rows: Annotated[int, typer.Option(help="queries compared in a window")] = 512,
    page_size: Annotated[int, typer.Option(help="tokens a page: the plugin's page_size")] = 64,
    width: Annotated[int | None, typer.Option(help="channels of a gate [default: the head size]")] = None,
    lr: opt.LearningRate = 1e-3,
    passkeys: Annotated[float, typer.Option(help="share of windows with passkeys to find")] = 0.25,
    seed: Annotated[int, typer.Option(help="of windows, queries and the gates' start")] = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    restart: opt.Restart = False,
    commit: opt.Commit = None,
) -> None:
    """Train SeerAttention-R gates by self-distillation; an interrupted run goes on where it stopped.

    Writes OUT, and beside it OUT.json: settings, losses, and how much attention mass the gates find in held-out text.
    """
    from vllm_ext.training import launch
    from vllm_ext.training import seer as training

    settings = training.Settings(steps, batch, window, rows, page_size, width, lr, passkeys=passkeys, seed=seed)
    settings.check()
    launch.run("train seer", training.train, settings, model, out, text or [], device, dtype, restart, commit)
