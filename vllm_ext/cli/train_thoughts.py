"""`vllm-ext train thoughts`: layers and thresholds by which ThinKV tells types of thought apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ext.cli import shared_options as opt


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command("thoughts")(thoughts)


def thoughts(
    model: opt.Model,
    out: Annotated[Path, opt.file_to_write("thoughts.json")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text, plain or .gz: answers in which the model reasons; repeatable [default: prose]"),
    ] = None,
    texts: Annotated[int, typer.Option(help="windows of text; every fifth is held out")] = 100,
    length: Annotated[int, typer.Option(help="tokens of a window: about think_kv.budget + stride")] = 1152,
    window: Annotated[int, typer.Option(help="queries of a measurement: think_kv.window")] = 32,
    layers: Annotated[int, typer.Option(help="layers that tell the type")] = 4,
    seed: Annotated[int, typer.Option(help="of the windows")] = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    commit: opt.Commit = None,
) -> None:
    """Find layers whose sparsity of attention has three modes, and the thresholds between them; nothing is trained.

    Writes OUT, and beside it OUT.json: modes of every layer, and how held-out text is typed. Ends with a sentence if no
    layer has three modes.
    """
    from vllm_ext.evaluation.progress import bars
    from vllm_ext.training import launch
    from vllm_ext.training import thoughts as training

    settings = training.Settings(texts, length, window, layers, seed)
    settings.check()
    with bars("train thoughts") as advance:

        def measure(*args: Any, checkpoint: Path) -> dict[str, Any]:
            return training.measure(*args, advance=advance)

        launch.run("train thoughts", measure, settings, model, out, text or [], device, dtype, False, commit)
