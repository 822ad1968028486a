"""`vllm-ext`: list, doctor, args, model, demo, eval, bench."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script; a ConfigError becomes one line on stderr and exit code 2."""
    from vllm_ext.cli.app import app
    from vllm_ext.options import ConfigError

    try:
        app()
    except ConfigError as error:
        print(f"vllm-ext: {error}", file=sys.stderr)
        raise SystemExit(2) from None
