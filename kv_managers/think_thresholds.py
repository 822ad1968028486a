"""The file that says how a model's thoughts are told apart. No torch import: it is read while options are checked."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ext.kv_managers.fingerprint import check_fingerprint
from vllm_ext.options import ConfigError

FORMAT = "vllm-ext thoughts 1"
OPTION = "think_kv.thoughts"


@dataclass(frozen=True)
class Thoughts:
    """How the sparsity of attention tells types of thought apart (ThinKV, section on calibration).

    Attributes:
        layers: whose sparsity is averaged.
        low: sparsity below which a thought is an execution.
        high: sparsity from which it is a transition; between them it is a reasoning.
        model: fingerprint of the model.
        notes: how it was measured.
    """

    layers: tuple[int, ...]
    low: float
    high: float
    model: dict[str, Any]
    notes: dict[str, Any]

    def check(self) -> None:
        """Raise ValueError for layers that the model does not have, or thresholds that are none."""
        count = self.model["num_hidden_layers"]
        if not self.layers or not all(type(i) is int and 0 <= i < count for i in self.layers):
            raise ValueError(f"layers {list(self.layers)} of {count}")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"thresholds {self.low} and {self.high}")

    def check_model(self, config: Any) -> None:
        """Raise ConfigError if the thoughts of another model were measured."""
        check_fingerprint(self.model, config, f"{OPTION} was measured on", "make a file with `vllm-ext train thoughts`")

    def save(self, path: Path) -> None:
        """Write the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"format": FORMAT, "model": self.model, "layers": list(self.layers), "low": self.low, "high": self.high}
        path.write_text(json.dumps(data | self.notes, indent=1) + "\n")


@functools.lru_cache(maxsize=8)
def load(path: str) -> Thoughts:
    """Read a file of `vllm-ext train thoughts`.

    Raises:
        ConfigError: no such file, another kind of file, or layers and thresholds that cannot be.
    """
    try:
        data = json.loads(Path(path).read_text())
        if data.pop("format") != FORMAT:
            raise ValueError("another format")
        layers = tuple(data.pop("layers"))
        found = Thoughts(layers, float(data.pop("low")), float(data.pop("high")), data.pop("model"), data)
        found.check()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{OPTION} '{path}' holds no thresholds ({type(error).__name__}: {error}); make the file with "
            "`vllm-ext train thoughts`."
        ) from None
    return found
