"""Perplexity and divergence of several models beside the first: a merged model beside the one it was made from."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_ext.evaluation.run import run_job
from vllm_ext.evaluation.settings import Settings
from vllm_ext.evaluation.worker import fresh_process
from vllm_ext.moe.checkpoint import Checkpoint
from vllm_ext.options import ConfigError


def compare(
    models: Sequence[Path],
    settings: Settings,
    *,
    in_process: bool = False,
    on_row: Callable[[list[dict[str, Any]]], None] = lambda results: None,
) -> list[dict[str, Any]]:
    """Run the tasks `kl` and `ppl` on every model; the first is the reference of the others.

    Args:
        models: model directories with the same tokenizer.
        settings: what to measure; its model is replaced.
        in_process: all engines in this process.
        on_row: called with the results so far after every model.

    Returns:
        Results as of `vllm-ext eval`, with the number of experts and of parameters of each model.

    Raises:
        ConfigError: models that cannot be compared, or a model's process failed.
    """
    opened = [Checkpoint(m) for m in models]
    for other in opened[1:]:
        if other.config.get("vocab_size") != opened[0].config.get("vocab_size"):
            raise ConfigError(
                f"{other.folder.name} has another vocabulary than {opened[0].folder.name}; compare models of one "
                "origin."
            )
    jobs = [replace(settings, model=str(m.folder), tasks=("kl", "ppl")) for m in opened]
    for job in jobs:
        job.check()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="vllm-ext-compare-") as scratch:
        for number, (checkpoint, own) in enumerate(zip(opened, jobs)):
            print(f"[{number + 1}/{len(opened)}] {checkpoint.folder.name}", file=sys.stderr, flush=True)
            task: dict[str, Any] = {"settings": own.to_json(), "label": checkpoint.folder.name, "options": {}}
            task |= {"scratch": scratch, "recording": number == 0}
            result = run_job(task) if in_process else fresh_process("vllm_ext.evaluation.run:run_job", task)
            results.append(result | {"num_experts": checkpoint.num_experts, "parameters": checkpoint.parameters()})
            on_row(results)
    return results
