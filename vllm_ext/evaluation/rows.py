"""The rows of a table: "dense", or plugin sets written as `quest:budget=512,dense_below=0` on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from vllm_ext.options import ConfigError

DENSE = "dense"
CONTROL = "dense (control)"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Row:
    """One engine configuration.

    Attributes:
        label: how tables name it; the text of the command line.
        options: plugin -> option -> value; empty = stock vLLM.
    """

    label: str = DENSE
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    def engine_args(self) -> dict[str, Any]:
        """Stock vLLM engine arguments of this row.

        Raises:
            ConfigError: unknown plugin or option, wrong type, conflict.
        """
        if not self.options:
            return {}
        import vllm_ext

        return vllm_ext.engine_args(*self.options, **self.options)

    def plugins(self) -> dict[str, Any]:
        """The validated plugin objects by name; empty for the dense row.

        Raises:
            ConfigError: as `engine_args`.
        """
        if not self.options:
            return {}
        from vllm_ext.config import expand

        return expand(list(self.options), self.options).plugins

    def attention(self) -> Any:
        """The row's attention method, or None."""
        return next((p for p in self.plugins().values() if p.kind == "attention"), None)


def parse_row(text: str) -> Row:
    """Read `name[:option=value,...][+name...]`, values as YAML; "dense" is stock vLLM once more, a control.

    Raises:
        ConfigError: malformed text; the sentence shows the right form.
    """
    if text.strip() == DENSE:
        return Row(CONTROL)
    options: dict[str, dict[str, Any]] = {}
    for part in text.split("+"):
        name, _, given = part.strip().partition(":")
        if not _NAME.fullmatch(name) or name in options or (not given and part.strip().endswith(":")):
            raise _malformed(text)
        options[name] = _options(text, given)
    return Row(text.strip(), options)


def parse_rows(texts: Sequence[str]) -> list[Row]:
    """The dense row, then one row for each text, in order.

    Raises:
        ConfigError: a malformed or repeated text.
    """
    rows = [Row()]
    for text in texts:
        row = parse_row(text)
        if any(r.label == row.label for r in rows[1:]):
            raise ConfigError(f"--plugins '{text}' is given twice; remove one of them.")
        rows.append(row)
    return rows


def check_prefill(rows: Sequence[Row]) -> None:
    """Refuse rows whose prompts are not prefilled with the full attention of the stock model.

    Raises:
        ConfigError: one sentence that names the plugin and why.
    """
    for plugin in (p for row in rows for p in row.plugins().values()):
        reason = "evicts inside prompts" if getattr(plugin, "trigger", None) == "streaming" else ""
        reason = "changes the routing of prompts" if getattr(plugin, "routes", False) else reason
        if reason:
            judged = f"--task gen is judged by a dense prefill, but {plugin.plugin_name()} {reason}"
            raise ConfigError(f"{judged}; drop the row or the task.")


def _options(text: str, given: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    # Commas inside brackets belong to a list value: dense_layers=[0,1].
    for item in re.split(r",(?![^\[]*\])", given) if given else []:
        name, equals, value = item.partition("=")
        if not equals or not _NAME.fullmatch(name.strip()) or name.strip() in values:
            raise _malformed(text)
        try:
            values[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise _malformed(text) from None
    return values


def _malformed(text: str) -> ConfigError:
    return ConfigError(f"--plugins '{text}' is malformed; write NAME or NAME:option=value,option=value.")
