"""`vllm-ext train lychee`: head roles of LycheeDecode for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_ext.cli import shared_options as opt


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command("lychee")(lychee)


def lychee(
    model: opt.Model,
    out: Annotated[Path, opt.file_to_write("roles.json")],
    text: opt.Text = None,
    steps: opt.Steps = 1000,
    window: Annotated[int, typer.Option(help="tokens of the longest prompt")] = 4096,
    batch: Annotated[int, typer.Option(help="prompts a step")] = 4,
    labels: Annotated[int, typer.Option(help="tokens of questions and answers at a prompt's end")] = 192,
    page_size: Annotated[int, typer.Option(help="tokens a page: the plugin's page_size; 1 = token sets")] = 64,
    keep: Annotated[float, typer.Option(help="share of the pages that a sparse head reads")] = 0.3,
    density: Annotated[float, typer.Option(help="target share of retrieval heads behind the first layer")] = 0.0833,
    anneal: Annotated[
        float, typer.Option(help="share of the steps over which the target falls to density; paper: 0")
    ] = 0.0,
    lr: opt.LearningRate = 0.01,
    penalty: Annotated[float, typer.Option(help="start of the sparsity multiplier")] = 2.0,
    seed: Annotated[int, typer.Option(help="of prompts and samples")] = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    restart: opt.Restart = False,
    commit: opt.Commit = None,
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
