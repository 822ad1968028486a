"""`vllm-ext train lychee`: head roles of LycheeDecode for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command("lychee")(lychee)


def lychee(
    model: Annotated[Path, typer.Option(help="model directory")],
    out: Annotated[Path, typer.Option(help="file to write: roles.json")],
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text, plain or .gz; repeatable [default: shipped prose]")
    ] = None,
    steps: Annotated[int, typer.Option(help="training steps")] = 1000,
    window: Annotated[int, typer.Option(help="tokens of the longest prompt")] = 4096,
    batch: Annotated[int, typer.Option(help="prompts a step")] = 4,
    labels: Annotated[int, typer.Option(help="tokens of questions and answers at a prompt's end")] = 192,
    page_size: Annotated[int, typer.Option(help="tokens a page: the plugin's page_size; 1 = token sets")] = 64,
    keep: Annotated[float, typer.Option(help="share of the pages that a sparse head reads")] = 0.3,
    density: Annotated[float, typer.Option(help="target share of retrieval heads behind the first layer")] = 0.0833,
    anneal: Annotated[
        float, typer.Option(help="share of the steps over which the target falls to density; paper: 0")
    ] = 0.0,
    lr: Annotated[float, typer.Option(help="highest learning rate")] = 0.01,
    penalty: Annotated[float, typer.Option(help="start of the sparsity multiplier")] = 2.0,
    seed: Annotated[int, typer.Option(help="of prompts and samples")] = 0,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
    dtype: Annotated[str, typer.Option(help="of the model: auto, bfloat16 or float32")] = "auto",
    restart: Annotated[
        bool, typer.Option("--restart", help="drop an interrupted run instead of going on with it")
    ] = False,
    commit: Annotated[str | None, typer.Option(help="commit to record where git is not at hand")] = None,
) -> None:
    """Find the KV heads that must read every key (HardKuma); an interrupted run goes on where it stopped.

    Writes OUT, and beside it OUT.json: settings, losses, and the error on held-out prompts beside random roles.
    """
    from vllm_ext.training import launch
    from vllm_ext.training import lychee as training

    settings = training.Settings(
        steps, batch, window, labels, page_size, keep, density, anneal, lr, penalty, seed=seed
    )  # fmt: skip
    settings.check()
    launch.run("train lychee", training.train, settings, model, out, text or [], device, dtype, restart, commit)
