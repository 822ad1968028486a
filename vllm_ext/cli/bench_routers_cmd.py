"""`vllm-ext bench routers`: router kernels beside vLLM's softmax top-k."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from vllm_ext.cli import shared_options as opt


def routers(
    tokens: opt.Tokens = None,
    out: Annotated[Path | None, opt.folder_for("routers.json")] = None,
    commit: opt.Commit = None,
) -> None:
    """Times of the MoE routers at the shapes of OLMoE and Qwen3-30B-A3B; needs CUDA."""
    from rich.console import Console

    from vllm_ext import records
    from vllm_ext.bench.routers import TOKENS, run, table

    rows = run(tokens=tuple(tokens or TOKENS))
    Console(width=150).print(table(rows))
    if out is not None:
        records.save(records.record("bench routers", rows, commit=commit), out / "routers.json")
        print(f"written: {out / 'routers.json'}")
