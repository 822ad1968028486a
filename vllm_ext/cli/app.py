"""The typer application: one module a command, heavy imports inside the commands."""

from __future__ import annotations

import importlib

import typer

app = typer.Typer(
    name="vllm-ext",
    help="Plugins for an unmodified vLLM: what there is, whether it works here, how good and how fast it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for _command in ("list", "doctor", "args", "model", "demo", "eval", "kv_error", "bench", "moe", "train"):
    importlib.import_module(f"vllm_ext.cli.{_command}_cmd").register(app)
