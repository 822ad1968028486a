"""`vllm-ext args`: the stock vLLM arguments that a set of plugins stands for."""

from __future__ import annotations

import json
import shlex
from typing import Annotated, Any

import typer

from vllm_ext import config
from vllm_ext.options import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("args")(args)


def args(
    names: Annotated[str, typer.Argument(help="Plugins, separated by commas, or a YAML file.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PLUGIN.OPTION=VALUE", help="One option; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Keyword arguments of LLM() as JSON.")] = False,
) -> None:
    """Print the stock vLLM arguments that switch plugins on: shell-quoted tokens, or JSON for LLM(**kwargs)."""
    selected, options = config.read_selection(names)
    expansion = config.expand(selected, config.override(options, parse_settings(set_ or [])))
    print(json.dumps(expansion.engine_args, indent=2) if as_json else shlex.join(expansion.cli))


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`plugin.option=value` texts as plugin -> option -> value; values are JSON, or else text.

    Raises:
        ConfigError: a text of another form.
    """
    options: dict[str, dict[str, Any]] = {}
    for setting in settings:
        key, has_value, text = setting.partition("=")
        plugin, has_option, option = key.partition(".")
        if not (has_value and has_option and plugin and option):
            raise ConfigError(f"--set takes PLUGIN.OPTION=VALUE (e.g. quest.budget=2048), got '{setting}'.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        if option in options.setdefault(plugin, {}):
            raise ConfigError(f"--set {key} is given twice; give it once.")
        options[plugin][option] = value
    return options
