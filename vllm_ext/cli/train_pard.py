"""`vllm-ext train pard`: a parallel draft model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_ext.cli import shared_options as opt


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command("pard")(pard)


def pard(
    model: Annotated[Path, typer.Option(help="directory of the model to adapt")],
    out: Annotated[Path, typer.Option(help="directory to write")],
    teacher: Annotated[
        Path | None, typer.Option(help="directory of the target model [default: the model itself]")
    ] = None,
    layers: Annotated[int, typer.Option(help="layers to keep, spread over the model's; 0 = all")] = 0,
    text: opt.Text = None,
    drafts: Annotated[int, typer.Option(help="tokens that are predicted in one forward")] = 8,
    keep: Annotated[float, typer.Option(help="share of anchors that each further token keeps")] = 0.7,
    keep_least: Annotated[float, typer.Option(help="share of anchors that every token keeps at least")] = 0.2,
    mask_token: Annotated[int, typer.Option(help="token id that stands for an unknown token; -1 = the last")] = -1,
    steps: opt.Steps = 2000,
    batch: opt.Batch = 8,
    window: opt.Window = 512,
    lr: opt.LearningRate = 4e-4,
    seed: Annotated[int, typer.Option(help="of windows and anchors")] = 0,
    device: opt.Device = "auto",
    restart: opt.Restart = False,
    commit: opt.Commit = None,
) -> None:
    """Adapt a model to draft several tokens in one forward (PARD); an interrupted run goes on where it stopped.

    Writes a model directory that `--plugins pard` takes, and OUT.json: settings, losses, agreement by position.
    """
    from vllm_ext import records
    from vllm_ext.options import ConfigError
    from vllm_ext.plugin import check_model_directory
    from vllm_ext.training import pard as training
    from vllm_ext.training import text as texts
    from vllm_ext.training.launch import checkpoint_of
    from vllm_ext.training.model import pick_device

    settings = training.Settings(
        layers=layers, drafts=drafts, keep=keep, keep_least=keep_least, mask_token=mask_token, steps=steps, batch=batch,
        window=window, lr=lr, seed=seed,
    )  # fmt: skip
    settings.check()
    for folder in (model, teacher or model):
        check_model_directory(str(folder.absolute()))
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out {out} is not empty; name a new directory.")
    read = texts.read(text or [])
    checkpoint = checkpoint_of(out)
    if restart:
        checkpoint.unlink(missing_ok=True)
    results = training.train(model, teacher or model, read, out, settings, checkpoint, pick_device(device))
    records.save(records.record("train pard", results, commit=commit), out.with_name(out.name + ".json"))
    print(f"written: {out}, {out.name}.json")
