"""What every `vllm-ext train` command does around the training itself: model, text, checkpoint, record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_ext import records
from vllm_ext.options import ConfigError


def checkpoint_of(out: Path) -> Path:
    """Where an interrupted run that writes `out` is kept."""
    return out.with_name(out.name + ".checkpoint")


def run(
    command: str, train: Callable[..., dict[str, Any]], settings: Any, model: Path, out: Path, texts: list[Path],
    device: str, dtype: str, restart: bool, commit: str | None,
) -> None:  # fmt: skip
    """Load the model and the text, train, and write `<out>.json` beside the result.

    Args:
        train: function of (frozen model, texts, out, settings, checkpoint=) that writes `out` and returns JSON results.
    """
    from vllm_ext.cli.eval_cmd import check_dtype
    from vllm_ext.training import text
    from vllm_ext.training.model import load

    check_dtype(dtype)
    if out.is_dir():
        raise ConfigError(f"--out {out} is a directory; name the file to write.")
    read = text.read(texts)
    checkpoint = checkpoint_of(out)
    if restart:
        checkpoint.unlink(missing_ok=True)
    results = train(load(model, device, dtype), read, out, settings, checkpoint=checkpoint)
    record = records.record(command, results, commit=commit)
    records.save(record, out.with_name(out.name + ".json"))
    print(f"written: {out}, {out.name}.json")
