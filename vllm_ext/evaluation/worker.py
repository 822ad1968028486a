"""One row in a process of its own: `python -m vllm_ext.evaluation.worker MODULE:FUNCTION JOB RESULT`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path


def main(target: str, job: str, result: str) -> None:
    """Read the job file (JSON), call the function with it, write what it returns to the result file (JSON)."""
    from vllm_ext.options import ConfigError

    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)

    try:
        Path(result).write_text(json.dumps(function(json.loads(Path(job).read_text()))))
    except ConfigError as error:
        print(f"vllm-ext: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(*sys.argv[1:])
