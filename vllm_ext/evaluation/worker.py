"""Rows in processes of their own, forked from one that has imported vLLM already: an import takes up to 30 s."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_ext.options import ConfigError


def fresh_process(target: str, job: dict[str, Any], limit: float | None = None) -> dict[str, Any]:
    """Call `target` ("module:function") with `job` in a process of its own, so that one engine a process holds.

    Args:
        target: called with `job`; both it and its result go through JSON.
        job: its "label" names the row in the error.
        limit: seconds that it may take; None = any.

    Raises:
        ConfigError: the process failed or was ended at `limit`; its messages are on stderr.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm_ext.evaluation.preload"])
    with tempfile.TemporaryDirectory(prefix="vllm-ext-row-") as folder:
        result = Path(folder) / "result.json"
        process = context.Process(target=_work, args=(target, json.dumps(job), str(result)))
        process.start()
        try:
            process.join(limit)
            if late := process.exitcode is None:
                process.kill()
                process.join()  # its GPU memory is free afterwards
        finally:
            process.terminate()
        if late:
            raise ConfigError(f"row '{job['label']}' took longer than {limit:g} s and was ended.")
        if process.exitcode or not result.exists():
            raise ConfigError(f"row '{job['label']}' failed (exit code {process.exitcode}); its messages are above.")
        return json.loads(result.read_text())


def _work(target: str, job: str, result: str) -> None:
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    try:
        Path(result).write_text(json.dumps(function(json.loads(job))))
    except ConfigError as error:
        print(f"vllm-ext: {error}", file=sys.stderr)
        raise SystemExit(2) from None
