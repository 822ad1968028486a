"""`vllm-ext train layers`: the layers' shares of a KV budget, for Layer-DefensiveKV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_ext.cli import shared_options as opt


def register(app: typer.Typer) -> None:
    """Add the subcommand."""
    app.command("layers")(layers)


def layers(
    model: opt.Model,
    out: Annotated[Path, opt.file_to_write("layers.json")],
    classes: Annotated[int, typer.Option(help="classes of equally many layers; each gets one share")] = 3,
    ratio: Annotated[float, typer.Option(help="share of the tokens that is kept")] = 0.2,
    length: Annotated[int, typer.Option(help="tokens of a text")] = 2048,
    texts: Annotated[int, typer.Option(help="texts, from the shipped prose")] = 8,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
) -> None:
    """Measure how much of a budget each layer needs by DefensiveKV's scores; nothing is trained."""
    from vllm_ext.cli.eval_cmd import check_dtype
    from vllm_ext.evaluation import corpus
    from vllm_ext.evaluation.progress import bars
    from vllm_ext.kv_managers.defensive_kv import DefensiveKV
    from vllm_ext.options import ConfigError
    from vllm_ext.training.layers import measure
    from vllm_ext.training.model import load

    check_dtype(dtype)
    if min(length - 64, texts) < 1 or out.is_dir():
        raise ConfigError("--length must be above 64, --texts at least 1, and --out a file.")
    method = DefensiveKV(ratio=ratio)
    frozen = load(model, device, dtype)
    windows = corpus.windows(frozen.tokenizer, texts, length, corpus.FILLER)
    with bars("train layers") as advance:
        profile = measure(frozen, method, windows, classes, out, advance)
    print(f"written: {out}; shares {sorted(set(profile.shares))}")
