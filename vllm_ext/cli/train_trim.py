"""`vllm-ext train trim`: retention gates of TRIM-KV for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_ext.cli import shared_options as opt


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command("trim")(trim)


def trim(
    model: opt.Model,
    out: Annotated[Path, opt.file_to_write("gates.safetensors")],
    text: opt.Text = None,
    steps: opt.Steps = 800,
    window: opt.Window = 2048,
    batch: opt.Batch = 4,
    passkeys: Annotated[int, typer.Option(help="windows of a step with passkeys to find")] = 1,
    memory: Annotated[int, typer.Option(help="tokens a KV head may hold before the capacity loss acts")] = 256,
    inner: Annotated[int, typer.Option(help="inner size of a gate")] = 128,
    bias: Annotated[float, typer.Option(help="first bias of a gate; the paper's 18 needs a long training")] = 8.0,
    lr: opt.LearningRate = 1e-3,
    capacity: Annotated[float, typer.Option(help="weight of the capacity loss")] = 1.0,
    seed: Annotated[int, typer.Option(help="of windows and the gates' start")] = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    restart: opt.Restart = False,
    commit: opt.Commit = None,
) -> None:
    """Train TRIM-KV retention gates by distillation under a memory limit; an interrupted run goes on where it stopped.

    Writes OUT, and beside it OUT.json: settings and losses, in training and on held-out text.
    """
    from vllm_ext.training import launch
    from vllm_ext.training import trim as training

    settings = training.Settings(
        steps=steps, batch=batch, window=window, passkeys=passkeys, memory=memory, inner=inner, bias=bias, lr=lr,
        capacity=capacity, seed=seed,
    )  # fmt: skip
    settings.check()
    launch.run("train trim", training.train, settings, model, out, text or [], device, dtype, restart, commit)
