"""The file that says how much of the budget each layer gets. No torch import: it is read while options are checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ext.kv_managers.fingerprint import check_fingerprint
from vllm_ext.options import ConfigError

FORMAT = "vllm-ext layer shares 1"
OPTION = "layer_defensive_kv.profile"


@dataclass(frozen=True)
class LayerProfile:
    """Shares of the layers relative to the budget; their mean is 1, and equally many layers have each.

    Attributes:
        shares: one number a layer.
        model: fingerprint of the model.
        notes: how it was measured.
    """

    shares: tuple[float, ...]
    model: dict[str, Any]
    notes: dict[str, Any]

    def for_layers(self, layers: int) -> list[float]:
        """The shares.

        Raises:
            ConfigError: of another number of layers.
        """
        if len(self.shares) != layers:
            raise ConfigError(f"{OPTION} is of {len(self.shares)} layers, the model has {layers}; measure this model.")
        return list(self.shares)

    def check_model(self, config: Any) -> None:
        """Raise ConfigError if the profile was measured on another model."""
        check_fingerprint(self.model, config, f"{OPTION} was measured on", "make one with `vllm-ext train layers`")

    def save(self, path: Path) -> None:
        """Write the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"format": FORMAT, "model": self.model, "shares": list(self.shares), **self.notes}
        path.write_text(json.dumps(data, indent=1) + "\n")


def load(path: str | Path) -> LayerProfile:
    """Read a profile: a file, or the name of a model whose profile this package brings (e.g. smollm2-135m).

    Raises:
        ConfigError: no such file, or not a profile.
    """
    if not path:
        raise ConfigError(f"{OPTION} is empty; give it the file that `vllm-ext train layers` writes.")
    shipped = Path(__file__).parent / "artefacts" / path / "layers.json"
    try:
        data = json.loads((shipped if shipped.is_file() else Path(path)).read_text())
        if data.pop("format") != FORMAT:
            raise ValueError
        return LayerProfile(tuple(float(s) for s in data.pop("shares")), data.pop("model"), data)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{OPTION} '{path}' is no layer profile ({type(error).__name__}); make one with `vllm-ext train layers`."
        ) from None


def classes(needs: Sequence[float], count: int) -> tuple[float, ...]:
    """Shares with mean 1: layers sorted by need, cut into `count` classes of equal size, each with its members' mean.

    Raises:
        ConfigError: the layers cannot be divided so.
    """
    layers = len(needs)
    if count < 1 or layers % count:
        fitting = [c for c in range(1, layers + 1) if layers % c == 0]
        raise ConfigError(f"--classes must divide the {layers} layers, got {count}; fitting: {fitting}.")
    order, size = sorted(range(layers), key=lambda i: needs[i]), layers // count
    mean = sum(needs) / layers
    shares = [0.0] * layers
    for c in range(count):
        members = order[c * size : (c + 1) * size]
        share = round(sum(needs[i] for i in members) / size / mean, 4)
        for i in members:
            shares[i] = share
    return tuple(shares)
