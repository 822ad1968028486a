"""MoE checkpoints in Hugging Face's layout: where the experts lie, read layer by layer, written shard by shard."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ext.gguf_convert import write_json
from vllm_ext.options import ConfigError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Layout:
    """Names of one model family.

    Attributes:
        block: module of a layer that holds gate and experts.
        parts: names of an expert's gate, up and down projections.
        count: config key of the number of experts.
        width: config key of an expert's width.
    """

    block: str
    parts: tuple[str, str, str]
    count: str
    width: str


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LAYOUTS = {
    "mixtral": Layout("block_sparse_moe", ("w1", "w3", "w2"), "num_local_experts", "intermediate_size"),
    "qwen3_moe": Layout("mlp", _PROJECTIONS, "num_experts", "moe_intermediate_size"),
    "qwen2_moe": Layout("mlp", _PROJECTIONS, "num_experts", "moe_intermediate_size"),
    "olmoe": Layout("mlp", _PROJECTIONS, "num_experts", "intermediate_size"),
}
"""`model_type` of config.json -> where its experts lie."""


@dataclass
class Experts:
    """The MoE block of one layer.

    Attributes:
        router: gate weight [E, d].
        gate, up: [E, n, d].
        down: [E, d, n].
    """

    router: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def __len__(self) -> int:
        return len(self.gate)

    def to(self, device: torch.device | str) -> Experts:
        """The same weights on another device."""
        return Experts(*(w.to(device) for w in (self.router, self.gate, self.up, self.down)))


class Checkpoint:
    """An MoE model directory; tensors are read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"'{folder}' has no readable config.json ({error}); give a model directory.") from None
        kind = str(self.config.get("model_type"))
        if kind not in LAYOUTS or not self.config.get(LAYOUTS[kind].count):
            raise ConfigError(
                f"'{folder}' is a {kind} model, not a mixture of experts of a known layout; give one of "
                f"{', '.join(LAYOUTS)}."
            )
        self.layout = LAYOUTS[kind]
        self.files = self._files()
        self._expert = re.compile(rf"model\.layers\.(\d+)\.{self.layout.block}\.(gate|experts\.\d+\.\w+)\.weight")
        self.layers = sorted({int(m[1]) for m in map(self._expert.fullmatch, self.files) if m})
        if not self.layers:
            raise ConfigError(f"'{folder}' holds no expert weights under their Hugging Face names; convert it first.")

    @property
    def num_experts(self) -> int:
        """Routed experts E of each MoE layer."""
        return int(self.config[self.layout.count])

    @property
    def top_k(self) -> int:
        """Experts a token."""
        return int(self.config["num_experts_per_tok"])

    def _files(self) -> dict[str, Path]:
        """Tensor name -> file."""
        from safetensors import safe_open

        index = self.folder / INDEX
        if index.exists():
            return {k: self.folder / v for k, v in json.loads(index.read_text())["weight_map"].items()}
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"'{self.folder}' holds no safetensors weights; give a directory of Hugging Face files.")
        names = {}
        for path in files:
            with safe_open(path, framework="pt") as stream:
                names.update(dict.fromkeys(stream.keys(), path))
        return names

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor."""
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as stream:
            return stream.get_tensor(name)

    def parameters(self) -> int:
        """Numbers in all tensors."""
        from safetensors import safe_open

        total = 0
        for path in set(self.files.values()):
            with safe_open(path, framework="pt") as stream:
                total += sum(math.prod(stream.get_slice(name).get_shape()) for name in stream.keys())  # noqa: SIM118
        return total

    def experts(self, layer: int) -> Experts:
        """Gate and experts of one layer, stacked."""
        import torch

        prefix = f"model.layers.{layer}.{self.layout.block}"
        stacked = [
            torch.stack([self.tensor(f"{prefix}.experts.{e}.{part}.weight") for e in range(self.num_experts)])
            for part in self.layout.parts
        ]
        return Experts(self.tensor(f"{prefix}.gate.weight"), *stacked)

    def others(self) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
        """What is no gate and no expert: file -> its tensors, file by file."""
        for path in sorted(set(self.files.values())):
            names = [n for n, p in self.files.items() if p == path and not self._expert.fullmatch(n)]
            if names:
                yield path, {n: self.tensor(n) for n in names}


def expert_tensors(layout: Layout, layer: int, experts: Experts) -> dict[str, torch.Tensor]:
    """Name -> tensor of one layer's gate and experts."""
    prefix = f"model.layers.{layer}.{layout.block}"
    tensors = {f"{prefix}.gate.weight": experts.router.contiguous()}
    for part, stack in zip(layout.parts, (experts.gate, experts.up, experts.down)):
        tensors |= {f"{prefix}.experts.{e}.{part}.weight": w.contiguous() for e, w in enumerate(stack)}
    return tensors


def check_folder(folder: Path) -> None:
    """Make the folder of results.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out '{folder}' cannot be made ({error.strerror}); give a folder to write to.") from None


class Writer:
    """Writes a model directory shard by shard; nothing is a model before `close`."""

    def __init__(self, out: Path, template: Path) -> None:
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"--out {out} exists and is not empty; choose another directory.")
        check_folder(out)
        self.out, self.template = out, template
        self._map: dict[str, str] = {}
        self._bytes = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """One shard."""
        from safetensors.torch import save_file

        name = f"model-{len(set(self._map.values())) + 1:05d}.safetensors"
        save_file(tensors, self.out / name, metadata={"format": "pt"})
        self._map.update(dict.fromkeys(tensors, name))
        self._bytes += sum(t.numel() * t.element_size() for t in tensors.values())

    def close(self, config: dict[str, Any]) -> Path:
        """Index, config and the template's other files (tokenizer, generation settings)."""
        write_json(self.out / INDEX, {"metadata": {"total_size": self._bytes}, "weight_map": self._map})
        for path in self.template.iterdir():
            skip = path.suffix == ".safetensors" or path.name in (INDEX, "config.json", "vllm_ext_manifest.json")
            if path.is_file() and not skip:
                shutil.copy(path, self.out / path.name)
        write_json(self.out / "config.json", config)
        for name in set(self._map.values()):  # safetensors keeps them from all other users
            shutil.copymode(self.out / "config.json", self.out / name)
        return self.out
