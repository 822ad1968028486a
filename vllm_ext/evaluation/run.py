"""Run the tasks for the dense row and for every plugin row, one engine after the other."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_ext.evaluation.rows import Row, check_prefill
from vllm_ext.evaluation.settings import Settings
from vllm_ext.evaluation.worker import fresh_process
from vllm_ext.options import ConfigError


def evaluate(
    settings: Settings,
    rows: list[Row],
    *,
    in_process: bool = False,
    on_row: Callable[[list[dict[str, Any]]], None] = lambda results: None,
) -> list[dict[str, Any]]:
    """Measure every row; the first must be the dense one, the others are compared with it.

    Args:
        settings: what to measure.
        rows: engine configurations, dense first.
        in_process: run all engines in this process (faster); otherwise each row gets a fresh one.
        on_row: called with the results so far after every row, to be saved.

    Raises:
        ConfigError: bad settings, or a row's process failed.
    """
    settings.check()
    if not rows or rows[0].options:
        raise ConfigError("the first row of an evaluation must be the dense one.")
    if "gen" in settings.tasks:
        check_prefill(rows)
    results: list[dict[str, Any]] = []
    # The dense logits of the kl task: float32, texts x positions x vocabulary.
    with tempfile.TemporaryDirectory(prefix="vllm-ext-eval-") as scratch:
        for number, row in enumerate(rows):
            print(f"[{number + 1}/{len(rows)}] {row.label}", file=sys.stderr, flush=True)
            job: dict[str, Any] = {"settings": settings.to_json(), "label": row.label, "options": row.options}
            job |= {"scratch": scratch, "recording": number == 0}
            results.append(run_job(job) if in_process else fresh_process("vllm_ext.evaluation.run:run_job", job))
            on_row(results)
    return results


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Measure one row in this process and return its JSON-ready result."""
    from vllm_ext.evaluation.engine import engine
    from vllm_ext.evaluation.progress import bars

    settings = Settings.from_json(job["settings"])
    row = Row(job["label"], job["options"])
    began = time.monotonic()
    result: dict[str, Any] = {"label": row.label, "options": row.options, "notes": notes(settings, row)}
    result["budget"] = getattr(row.attention(), "budget", None)
    with engine(settings.model, settings.engine_args() | row.engine_args()) as llm:
        result["engine"] = describe(llm) | {"start_s": round(time.monotonic() - began, 1)}
        with bars(row.label) as advance:
            result |= _measure(llm, settings, row, job, advance)
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def _measure(llm: Any, settings: Settings, row: Row, job: dict[str, Any], advance: Callable) -> dict[str, Any]:
    from vllm_ext.evaluation import generation, tasks
    from vllm_ext.evaluation.teacher import Tape

    result: dict[str, Any] = {}
    if "niah" in settings.tasks:
        result["niah"] = tasks.run_niah(llm, settings, advance)
    if {"kl", "ppl"} & set(settings.tasks):
        tape = Tape(Path(job["scratch"]), recording=job["recording"])
        cells = tasks.run_forced(llm, settings, tape, advance)
        for task in ("kl", "ppl"):
            if task in settings.tasks:
                common = ("length", "texts", "positions", "read")
                result[task] = [{k: c[k] for k in common if k in c} | c[task] for c in cells if task in c]
    if "gen" in settings.tasks:
        result["gen"] = generation.run_gen(llm, settings, row, Path(job["scratch"]), job["recording"], advance)
    return result


def notes(settings: Settings, row: Row) -> list[str]:
    """Lengths that the row's attention method serves exactly, so that its cells prove nothing about sparsity."""
    method = row.attention()
    exact = [n for n in settings.lengths if method is not None and n < method.dense_limit]
    return [
        f"{n} tokens are within dense_below ({method.dense_limit}): exact by construction, at least at first"
        for n in exact
    ]


def describe(llm: Any) -> dict[str, Any]:
    """What the engine really is: runner, graph mode, backend, block size."""
    config = llm.llm_engine.vllm_config
    return {
        "model_runner": "v2" if config.use_v2_model_runner else "v1",
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "attention_backend": getattr(config.attention_config.backend, "name", "auto"),
        "block_size": config.cache_config.block_size,
        "prefix_caching": bool(config.cache_config.enable_prefix_caching),
    }
