"""One row of an evaluation in a process of its own: `python -m vllm_ext.evaluation.worker JOB RESULT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(job: str, result: str) -> None:
    """Read the job file, measure, write the result file."""
    from vllm_ext.evaluation.run import run_job
    from vllm_ext.options import ConfigError

    try:
        Path(result).write_text(json.dumps(run_job(json.loads(Path(job).read_text()))))
    except ConfigError as error:
        print(f"vllm-ext: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(*sys.argv[1:])
