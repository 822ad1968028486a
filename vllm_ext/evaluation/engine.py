"""Engines for measurements: in this process, one after the other, really gone afterwards."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_ext.options import ConfigError


def prepare_process() -> None:
    """Keep vLLM's engine core in this process (logits and step times are read there) and its log short.

    Triton's own cache folder serves all engines; vLLM would give each compiled configuration an empty one, and compile
    its kernels for 20 to 30 s again.

    Raises:
        ConfigError: vLLM was imported with its engine in another process.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    home = Path(os.environ.get("TRITON_HOME") or "~").expanduser()
    os.environ.setdefault("TRITON_CACHE_DIR", str(home / ".triton" / "cache"))
    from vllm import envs

    if envs.VLLM_ENABLE_V1_MULTIPROCESSING:
        raise ConfigError("the engine must run in process here; start a fresh Python process for it.")


@contextlib.contextmanager
def engine(model: str | Path, arguments: dict[str, Any]) -> Iterator[Any]:
    """A `vllm.LLM` that is shut down, and its memory released, on leaving the block.

    Args:
        model: directory or hub name.
        arguments: further arguments of `vllm.LLM`.
    """
    prepare_process()
    from vllm import LLM

    llm = LLM(str(model), **arguments)
    try:
        yield llm
    finally:
        destroy(llm)


def destroy(llm: Any) -> None:
    """Shut the engine down and cut the references that keep its weights and KV cache alive."""
    llm.llm_engine.engine_core.shutdown()
    llm.llm_engine.engine_core.engine_core = None
    llm.llm_engine.model_executor = None
    llm.llm_engine = None
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated() / 2**30
        if held > 1:
            print(f"warning: {held:.1f} GiB of the last engine are still held", file=sys.stderr, flush=True)


def check_model(model: str) -> dict[str, Any]:
    """The model's `config.json`, or {} for a hub name that vLLM has to resolve.

    Raises:
        ConfigError: a path that is no readable model directory.
    """
    import json

    path = Path(model).expanduser()
    looks_like_path = path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1
    if not looks_like_path:
        return {}
    try:
        data = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise ConfigError(
            f"model '{model}' is not a readable model directory (config.json: {reason}); give a directory that "
            "holds config.json and weights."
        ) from None
    return data if isinstance(data, dict) else {}


def check_length(config: dict[str, Any], need: int, option: str) -> None:
    """Refuse a length that the model's positions do not cover.

    Args:
        config: the model's config.json; {} passes.
        need: tokens of prompt and output.
        option: the command-line option to name.

    Raises:
        ConfigError: `need` is more than `max_position_embeddings`.
    """
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int) and need > limit:
        raise ConfigError(f"{option} needs {need} tokens with the output, but the model takes {limit}; lower {option}.")
