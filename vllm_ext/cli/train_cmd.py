"""`vllm-ext train`: what a plugin learns from a model before it is served; one module `train_<name>` a subcommand."""

from __future__ import annotations

import importlib

import typer

SUBCOMMANDS = ("seer", "lychee", "trim", "layers", "thoughts", "pard")


def register(app: typer.Typer) -> None:
    """Add the command and its subcommands to the application."""
    train = typer.Typer(
        help="Train what a plugin needs of a model: gates, head roles, drafters. An interrupted run can go on.",
        no_args_is_help=True,
        add_completion=False,
    )
    for name in SUBCOMMANDS:
        importlib.import_module(f"vllm_ext.cli.train_{name}").register(train)
    app.add_typer(train, name="train")
