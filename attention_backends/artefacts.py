"""Files that ship with the package: what was trained for one model, found by the model's shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_ext.attention_backends.rope import ModelShape

FOLDER = Path(__file__).with_name("artefacts")
"""One folder a model."""


def shipped(name: str, model: ModelShape, model_of: Callable[[Path], Mapping[str, Any] | None]) -> Path | None:
    """The shipped file `name` that was trained for a model of this shape, or None.

    Args:
        model_of: the shape that a file says it was trained for (`ModelShape.to_json`).
    """
    found = (path for path in sorted(FOLDER.glob(f"*/{name}")) if model_of(path) == model.to_json())
    return next(found, None)
