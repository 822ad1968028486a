"""The file of a model's gates (SeerAttention-R): safetensors in the layout of the published gates.

Of layer i, with H KV heads, g query heads a KV head, head size D and gate width E:

    model.layers.{i}.self_attn.attn_gate.attngate_linear_q.weight   [H, g, D, E]
    model.layers.{i}.self_attn.attn_gate.attngate_linear_k.weight   [H, 3 * D, E]   pools in the order max, min, mean
    model.layers.{i}.self_attn.attn_gate.attngate_qnorm.weight      [E]
    model.layers.{i}.self_attn.attn_gate.attngate_knorm.weight      [E]

Files trained here carry the model's shape and the page size in the header; in published files they are unknown, and
the shapes of the tensors have to agree. No torch import here: the header is checked before the engine starts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ext.attention_backends.rope import ModelShape
from vllm_ext.options import ConfigError

FORMAT = "vllm-ext seer gates 1"
WIDTHS = (16, 32, 64, 128, 256)
"""Channels that the kernels take."""
PARTS = {"q": "attngate_linear_q", "k": "attngate_linear_k", "q_norm": "attngate_qnorm", "k_norm": "attngate_knorm"}
_NAME = re.compile(r"layers\.(\d+)\.self_attn\.attn_gate\.(attngate_\w+)\.weight$")


def tensor_name(layer: int, part: str) -> str:
    """Name in the file; part: q, k, q_norm or k_norm."""
    return f"model.layers.{layer}.self_attn.attn_gate.{PARTS[part]}.weight"


def shapes(model: ModelShape, width: int) -> dict[str, tuple[int, ...]]:
    """Part -> shape of one layer's tensors for gates of `width` channels."""
    h, d = model.kv_heads, model.head_size
    return {"q": (h, model.group, d, width), "k": (h, 3 * d, width), "q_norm": (width,), "k_norm": (width,)}


@dataclass(frozen=True)
class GateFile:
    """What the header of a gate file says.

    Attributes:
        names: (layer, part) -> name of the tensor.
        sizes: (layer, part) -> its shape.
        notes: the header's own notes, empty for a published file.
    """

    path: Path
    names: Mapping[tuple[int, str], str]
    sizes: Mapping[tuple[int, str], tuple[int, ...]]
    notes: Mapping[str, Any]

    @property
    def width(self) -> int:
        """Channels of a gate query and key."""
        return next(iter(size[-1] for (_, part), size in self.sizes.items() if part == "q"))

    def check(self, model: ModelShape, page_size: int, layers: list[int]) -> None:
        """Raise ConfigError unless the file holds gates of `model` for pages of `page_size` tokens.

        Args:
            layers: the layers that need a gate.
        """
        mine, retrain = self.notes.get("model"), "train others with `vllm-ext train seer`"
        if mine is not None and mine != model.to_json():
            raise ConfigError(
                f"seer.gates {self.path} holds the gates of another model ({ModelShape(**mine)}), this one has "
                f"{model}; {retrain}."
            )
        page = self.notes.get("page_size", page_size)
        if page != page_size:
            raise ConfigError(
                f"seer.gates {self.path} was trained for pages of {page} tokens, but seer.page_size is {page_size}; "
                f"set seer.page_size to {page}."
            )
        if self.width not in WIDTHS:
            raise ConfigError(
                f"seer.gates {self.path} has gates of {self.width} channels, {', '.join(map(str, WIDTHS))} are "
                f"supported; {retrain} and --width 128."
            )
        expected = shapes(model, self.width)
        for layer in layers:
            for part, shape in expected.items():
                found = self.sizes.get((layer, part))
                if found != shape:
                    what = f"has shape {list(found)}" if found else "is missing"
                    raise ConfigError(
                        f"seer.gates {self.path}: {tensor_name(layer, part)} {what}, this model needs {list(shape)}; "
                        f"{retrain}."
                    )

    def load(self, layer: int, first_head: int, heads: int) -> dict[str, Any]:
        """Tensors of some KV heads of one layer: q [heads, g * D, E], k [heads, 3 * D, E], q_norm, k_norm [E]."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            found = {part: file.get_tensor(self.names[layer, part]) for part in PARTS}
        rows = slice(first_head, first_head + heads)
        return found | {"q": found["q"][rows].flatten(1, 2).contiguous(), "k": found["k"][rows].contiguous()}


def read(path: str | Path) -> GateFile:
    """The header of a gate file.

    Raises:
        ConfigError: no such file, or no gates in it.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path).expanduser()
    parts = {v: k for k, v in PARTS.items()}
    names: dict[tuple[int, str], str] = {}
    sizes: dict[tuple[int, str], tuple[int, ...]] = {}
    try:
        with safe_open(path, framework="np") as file:
            notes = json.loads((file.metadata() or {}).get("vllm_ext", "{}"))
            for name in file.keys():  # noqa: SIM118
                found = _NAME.search(name)
                if found and found[2] in parts:
                    key = int(found[1]), parts[found[2]]
                    names[key], sizes[key] = name, tuple(file.get_slice(name).get_shape())
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(
            f"seer.gates {path} cannot be read as safetensors ({type(error).__name__}: {error}); give a file made by "
            "`vllm-ext train seer`."
        ) from error
    if not any(part == "q" for _, part in names):
        raise ConfigError(
            f"seer.gates {path} holds no tensor named like {tensor_name(0, 'q')}; give a file made by "
            "`vllm-ext train seer`, or published gates as safetensors."
        )
    return GateFile(path, names, sizes, notes)


def write(path: Path, layers: Sequence[Mapping[str, Any]], model: ModelShape, page_size: int, **notes: Any) -> None:
    """Write gates; `layers`: of each layer the torch tensors q, k, q_norm, k_norm in the shapes of `shapes`."""
    from safetensors.torch import save_file

    tensors = {tensor_name(i, part): layer[part].contiguous() for i, layer in enumerate(layers) for part in PARTS}
    header = {"format": FORMAT, "model": model.to_json(), "page_size": page_size, **notes}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"vllm_ext": json.dumps(header)})
    part.chmod(0o644)  # safetensors writes private files
    part.replace(path)
