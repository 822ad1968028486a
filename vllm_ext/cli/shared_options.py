"""Options that several commands have: name, type and help text in one place. Defaults stay with the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def folder_for(*files: str) -> Any:
    """`--out` of a command that writes these files into a folder."""
    return typer.Option(help=f"folder for {' and '.join(files)}")


def file_to_write(what: str) -> Any:
    """`--out` of a command that writes one file."""
    return typer.Option(help=f"file to write: {what}")


Commit = Annotated[str | None, typer.Option(help="commit to record where git is not at hand")]

# engines
Eager = Annotated[bool, typer.Option("--eager", help="no CUDA graphs, no torch.compile")]
Memory = Annotated[float, typer.Option(help="share of GPU memory that vLLM may take")]
KvMemory = Annotated[
    float | None, typer.Option(help="GiB of the KV cache, instead of --memory: evaluations can share a GPU")
]
ServedDtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32")]
Resume = Annotated[
    bool, typer.Option("--resume", help="continue the record in --out: rows that it has are not run again")
]

# models that run in the command's own process
Model = Annotated[Path, typer.Option(help="model directory")]
Device = Annotated[str, typer.Option(help="auto, cuda or cpu")]
Dtype = Annotated[str, typer.Option(help="of the model: auto, bfloat16 or float32")]

# training
Text = Annotated[list[Path] | None, typer.Option(help="UTF-8 text, plain or .gz; repeatable [default: shipped prose]")]
Steps = Annotated[int, typer.Option(help="training steps")]
Window = Annotated[int, typer.Option(help="tokens a window")]
Batch = Annotated[int, typer.Option(help="windows a step")]
LearningRate = Annotated[float, typer.Option(help="highest learning rate")]
Restart = Annotated[bool, typer.Option("--restart", help="drop an interrupted run instead of going on with it")]

# MoE layers
Tokens = Annotated[list[int] | None, typer.Option(help="tokens of a call; repeatable [default: 1 to 16384]")]
