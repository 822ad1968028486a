"""The file of a routing trace: expert ids of every traced token and MoE layer, request by request (safetensors)."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_ext.options import ConfigError

FORMAT = "vllm_ext-moe-trace-1"


@dataclass(frozen=True)
class Trace:
    """What was routed where.

    Attributes:
        model: name of the model.
        num_experts, top_k: E and K.
        layers: numbers of the MoE layers in the model, L of them.
        experts: [N, L, W] uint8 or int16 expert ids of N tokens; `none` = column not used.
        offsets: [R + 1] int64, rows of request r are offsets[r] to offsets[r + 1].
        first: [R] int32, position of a request's first row (tokens before it came out of the prefix cache).
        prompt: [R] int32, prompt tokens.
    """

    model: str
    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    experts: np.ndarray
    offsets: np.ndarray
    first: np.ndarray
    prompt: np.ndarray

    @property
    def none(self) -> int:
        """The id of an unused column."""
        return none_id(self.experts.dtype)

    @property
    def requests(self) -> list[np.ndarray]:
        """[T_r, L, W] ids of each request."""
        return [self.experts[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:])]

    def save(self, path: Path) -> None:
        """Write the file, replacing an older one in one step; OSError if it cannot be written."""
        from safetensors.numpy import save

        facts = {"format": FORMAT, "model": self.model, "num_experts": str(self.num_experts), "top_k": str(self.top_k)}
        facts["layers"] = json.dumps(list(self.layers))
        arrays = {"experts": self.experts, "offsets": self.offsets, "first": self.first, "prompt": self.prompt}
        part = path.with_name(path.name + ".part")
        part.write_bytes(save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata=facts))
        os.replace(part, path)


def id_dtype(num_experts: int) -> type[np.unsignedinteger] | type[np.signedinteger]:
    """The narrowest dtype that holds every expert id and one more value."""
    return np.uint8 if num_experts < 255 else np.int16


def none_id(dtype: np.dtype | type) -> int:
    """The value that -1 becomes in the dtype of a trace."""
    return 255 if np.dtype(dtype) == np.uint8 else -1


def load(path: Path) -> Trace:
    """Read a trace.

    Raises:
        ConfigError: no such file, another format, or an empty trace.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as stream:
            facts = stream.metadata() or {}
            if facts.get("format") != FORMAT:
                raise ConfigError(f"'{path}' is not a routing trace; give a file that --plugins moe_trace has written.")
            arrays = {name: stream.get_tensor(name) for name in ("experts", "offsets", "first", "prompt")}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"trace '{path}' cannot be read ({error}); give a file of --plugins moe_trace.") from None
    trace = Trace(
        model=facts["model"],
        num_experts=int(facts["num_experts"]),
        top_k=int(facts["top_k"]),
        layers=tuple(json.loads(facts["layers"])),
        **arrays,
    )
    if not len(trace.experts):
        raise ConfigError(f"trace '{path}' holds no tokens; send requests to the server that writes it.")
    return trace


def check_model(trace: Trace, path: Path, num_experts: int, top_k: int, layers: list[int], model: str) -> None:
    """Raise ConfigError if `trace` cannot be of a model with these MoE layers; say so if it has another name."""
    theirs = (trace.num_experts, trace.top_k, list(trace.layers))
    if theirs != (num_experts, top_k, layers):
        raise ConfigError(
            f"trace '{path}' is of {trace.model} ({trace.num_experts} experts, {trace.top_k} a token, "
            f"{len(trace.layers)} layers), not of {model} ({num_experts}, {top_k}, {len(layers)}); trace that model."
        )
    if trace.model != model:  # it may have been renamed
        print(f"note: trace '{path}' is of {trace.model}, taken for {model} since their sizes agree.", file=sys.stderr)
