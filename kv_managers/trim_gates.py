"""The file of TRIM-KV's retention gates: safetensors with the model's fingerprint in its metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ext.kv_managers.fingerprint import check_fingerprint, fingerprint
from vllm_ext.options import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "vllm-ext trim gates 1"
SHIPPED = "trim_gates.safetensors"


@dataclass(frozen=True)
class TrimGates:
    """Gates of all layers: L layers, D hidden size, I inner size, H KV heads.

    Attributes:
        tensors: `w1` [L, I, D], `b1` [L, I], `w2` [L, H, I], `b` [L, H].
        activation: the model's own MLP activation.
        memory: tokens a head was trained to hold.
        model: `fingerprint` of the model.
    """

    tensors: dict[str, Tensor]
    activation: str
    memory: int
    model: dict[str, Any]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor that `model` asks for; the inner size is the file's own."""
        m = self.model
        layers, hidden, heads = m["num_hidden_layers"], m["hidden_size"], m["num_key_value_heads"]
        inner = self.tensors["b1"].shape[-1] if "b1" in self.tensors and self.tensors["b1"].dim() == 2 else 0
        return {
            "w1": (layers, inner, hidden), "b1": (layers, inner), "w2": (layers, heads, inner), "b": (layers, heads),
        }  # fmt: skip

    def layer(self, index: int, heads: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`w1, b1, w2, b` of one layer for the KV heads of one tensor-parallel rank."""
        t = self.tensors
        return t["w1"][index], t["b1"][index], t["w2"][index, heads], t["b"][index, heads]

    def save(self, path: Path | str) -> None:
        """Write the file, replacing one that is there in one step."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        meta = {"format": FORMAT, "activation": self.activation, "memory": str(self.memory)}
        meta["model"] = json.dumps(self.model)
        part = path.with_suffix(".part")
        save_file({k: v.detach().cpu().contiguous() for k, v in self.tensors.items()}, part, metadata=meta)
        part.chmod(0o644)  # safetensors makes files that only their owner reads
        part.replace(path)


def load(path: Path | str, option: str = "trim_kv.gates") -> TrimGates:
    """Read a gate file.

    Args:
        path: what `vllm-ext train trim` wrote.
        option: named in the error.

    Raises:
        ConfigError: no such file, another kind of file, or a tensor of the wrong shape (the sentence says which).
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{option} '{path}' cannot be read ({type(error).__name__}); make the file with `vllm-ext train trim`."
        ) from None
    if meta.get("format") != FORMAT:
        raise ConfigError(f"{option} '{path}' holds no retention gates; make the file with `vllm-ext train trim`.")
    gates = TrimGates(tensors, meta["activation"], int(meta["memory"]), json.loads(meta["model"]))
    for name, shape in gates.shapes().items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise ConfigError(
                f"{option} '{path}': tensor '{name}' must have shape {shape}, found {found}; train again."
            )
    return gates


def shipped(config: Any) -> Path:
    """The gates that this package brings for a model.

    Raises:
        ConfigError: there are none.
    """
    here = fingerprint(config)
    for path in sorted((Path(__file__).parent / "artefacts").glob(f"*/{SHIPPED}")):
        if load(path).model == here:
            return path
    raise ConfigError(
        "trim_kv.gates is empty and no gates are shipped for this model; make them with `vllm-ext train trim` and give "
        "the file."
    )


def check_model(gates: TrimGates, config: Any, option: str = "trim_kv.gates") -> None:
    """Raise ConfigError if the gates were trained on another model than the one of this configuration."""
    check_fingerprint(
        gates.model, config, f"{option} was trained on", "train gates for this one with `vllm-ext train trim`"
    )
