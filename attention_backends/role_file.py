"""The file of a model's head roles (LycheeDecode): JSON with one row a layer and one number a KV head.

    {"format": "vllm-ext lychee roles 1", "model": {...}, "retrieval": [[0 or 1]], "score": [[0 .. 1]], ...}

`retrieval` 1: the head reads every key and chooses pages for the layers behind it. `score` ranks the heads, so that
another number of retrieval heads can be served than was trained for. No torch import here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ext.attention_backends.rope import ModelShape
from vllm_ext.options import ConfigError

FORMAT = "vllm-ext lychee roles 1"
Map = tuple[tuple[bool, ...], ...]
"""[layers][KV heads]; the first layer's heads are all retrieval heads."""


@dataclass(frozen=True)
class RoleFile:
    """Roles as the file has them."""

    path: Path
    retrieval: Map
    score: Sequence[Sequence[float]]
    model: Mapping[str, Any]

    def check(self, model: ModelShape) -> None:
        """Raise ConfigError unless the roles are those of `model`."""
        retrain = "train others with `vllm-ext train lychee`"
        for name, rows in (("retrieval", self.retrieval), ("score", self.score)):
            found = sorted({(len(rows), len(row)) for row in rows})
            if found != [(model.layers, model.kv_heads)]:
                raise ConfigError(
                    f"lychee.roles {self.path}: '{name}' has shape {found}, this model needs "
                    f"[{model.layers}, {model.kv_heads}] (layers, KV heads); {retrain}."
                )
        if dict(self.model) != model.to_json():
            raise ConfigError(
                f"lychee.roles {self.path} holds the roles of another model ({ModelShape(**self.model)}), this one has "
                f"{model}; {retrain}."
            )

    def best(self, count: int) -> Map:
        """The first layer, and the `count` heads behind it with the largest scores."""
        ranked = sorted(
            ((-s, layer, h) for layer, row in enumerate(self.score) for h, s in enumerate(row) if layer), key=tuple
        )
        chosen = {(layer, h) for _, layer, h in ranked[:count]}
        return tuple(tuple(i == 0 or (i, h) in chosen for h in range(len(row))) for i, row in enumerate(self.score))


def read(path: str | Path) -> RoleFile:
    """The roles in a file.

    Raises:
        ConfigError: no such file, or no role file.
    """
    path = Path(path).expanduser()
    try:
        data = json.loads(path.read_text())
        if data["format"] != FORMAT:
            raise ValueError(f"format '{data['format']}'")
        retrieval = tuple(tuple(bool(x) for x in row) for row in data["retrieval"])
        retrieval = (tuple(True for _ in retrieval[0]), *retrieval[1:])
        score = [[float(x) for x in row] for row in data["score"]]
        return RoleFile(path, retrieval, score, ModelShape(**data["model"]).to_json())
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(
            f"lychee.roles {path} is no role file ({type(error).__name__}: {error}); give a file made by "
            "`vllm-ext train lychee`."
        ) from error


def write(
    path: Path, retrieval: Sequence[Sequence[bool]], score: Sequence[Sequence[float]], model: ModelShape, **notes: Any
) -> None:
    """Write roles [layers][KV heads] and the scores that rank the heads."""
    data = {"format": FORMAT, "model": model.to_json(), **notes}
    data |= {
        "retrieval": [[int(x) for x in row] for row in retrieval],
        "score": [[round(float(x), 4) for x in row] for row in score],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    rows = json.dumps(data, indent=1)
    part.write_text(rows + "\n")
    part.replace(path)
