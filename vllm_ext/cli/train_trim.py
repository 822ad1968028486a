"""`vllm-ext train trim`: retention gates of TRIM-KV for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command("trim")(trim)


def trim(
    model: Annotated[Path, typer.Option(help="model directory")],
    out: Annotated[Path, typer.Option(help="file to write: gates.safetensors")],
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text, plain or .gz; repeatable [default: shipped prose]")
    ] = None,
    steps: Annotated[int, typer.Option(help="training steps")] = 800,
    window: Annotated[int, typer.Option(help="tokens a window")] = 2048,
    batch: Annotated[int, typer.Option(help="windows a step")] = 4,
    passkeys: Annotated[int, typer.Option(help="windows of a step with passkeys to find")] = 1,
    memory: Annotated[int, typer.Option(help="tokens a KV head may hold before the capacity loss acts")] = 256,
    inner: Annotated[int, typer.Option(help="inner size of a gate")] = 128,
    bias: Annotated[float, typer.Option(help="first bias of a gate; the paper's 18 needs a long training")] = 8.0,
    lr: Annotated[float, typer.Option(help="highest learning rate")] = 1e-3,
    capacity: Annotated[float, typer.Option(help="weight of the capacity loss")] = 1.0,
    seed: Annotated[int, typer.Option(help="of windows and the gates' start")] = 0,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
    dtype: Annotated[str, typer.Option(help="of the model: auto, bfloat16 or float32")] = "auto",
    restart: Annotated[
        bool, typer.Option("--restart", help="drop an interrupted run instead of going on with it")
    ] = False,
    commit: Annotated[str | None, typer.Option(help="commit to record where git is not at hand")] = None,
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
