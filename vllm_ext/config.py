"""From plugin names and options to stock vLLM engine arguments, and back. Imports neither torch nor vLLM.

Precedence of options, lowest first: defaults of the plugin, the YAML file of `--plugins`, `additional-config` in
vLLM's own `--config` file, `--additional-config JSON`, `--additional-config.vllm_ext.<plugin>.<option>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ext import catalogue, options

SECTION = "vllm_ext"
"""Our key in vLLM's `additional_config`: {"vllm_ext": {plugin: {option: value}}}."""


@dataclass(frozen=True)
class Expansion:
    """What a set of plugins stands for.

    Attributes:
        plugins: the validated plugin objects, by name.
        engine_args: keyword arguments for `LLM` or `EngineArgs`.
    """

    plugins: dict[str, Any]
    engine_args: dict[str, Any]

    @property
    def stock_args(self) -> dict[str, Any]:
        """The engine arguments other than `additional_config`."""
        return {k: v for k, v in self.engine_args.items() if k != "additional_config"}

    @property
    def cli(self) -> list[str]:
        """The engine arguments as command-line tokens of `vllm serve`."""
        tokens = [t for name, value in self.stock_args.items() for t in flag_tokens(name, value)]
        return tokens + dotted_tokens("additional-config", self.engine_args["additional_config"])


def expand(names: Sequence[str], given: Mapping[str, Any] | None = None) -> Expansion:
    """Validate plugins and options and work out the engine arguments that switch them on.

    Args:
        names: plugins of the catalogue.
        given: plugin -> mapping of option to value (or None); only for plugins in `names`.

    Raises:
        ConfigError: unknown plugin or option, wrong type or value, plugins that exclude each other.
    """
    given = given or {}
    plugins = _build(names, given)
    engine_args: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for name, plugin in plugins.items():
        for arg, value in plugin.engine_args().items():
            if isinstance(value, Mapping) and agrees(engine_args.get(arg, {}), value):
                value = override(engine_args.get(arg, {}), value)
            elif engine_args.get(arg, value) != value:
                raise options.ConfigError(
                    f"plugins '{owner[arg]}' and '{name}' need different {arg} ({engine_args[arg]} and {value}); "
                    "select one of them, or change its options so that they agree."
                )
            engine_args[arg] = value
            owner[arg] = name
    chosen = {
        name: {k: v for k, v in p.options().items() if k in (given.get(name) or {})} for name, p in plugins.items()
    }
    return Expansion(plugins, {**engine_args, "additional_config": {SECTION: chosen}})


def _build(names: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """The validated plugin objects of `names`."""
    if not names:
        known = ", ".join(catalogue.load())
        raise options.ConfigError(f"--plugins needs the name of a plugin or a YAML file; known plugins: {known}.")
    entries = [catalogue.get(name) for name in names]
    for i, entry in enumerate(entries):
        for other in entries[:i]:
            if other.name == entry.name:
                raise options.ConfigError(f"plugin '{entry.name}' is named twice; name it once.")
            if other.name in entry.conflicts:
                raise options.ConfigError(
                    f"plugins '{other.name}' and '{entry.name}' exclude each other; keep one of them in --plugins."
                )
    for name in given:
        if name not in names:
            catalogue.get(name)
            raise options.ConfigError(
                f"options are given for plugin '{name}', which is not selected; add it to --plugins or drop them."
            )
    return {entry.name: options.build(entry.cls(), entry.name, given.get(entry.name)) for entry in entries}


def from_additional(additional_config: Any) -> dict[str, Any]:
    """The plugins that an engine configuration selects, by name; empty where it selects none.

    Args:
        additional_config: `VllmConfig.additional_config` (or the engine argument of that name).

    Raises:
        ConfigError: the section `vllm_ext` is malformed, or names unknown plugins or options.
    """
    if not isinstance(additional_config, Mapping) or SECTION not in additional_config:
        return {}
    section = check_section(additional_config[SECTION])
    return _build(list(section), section) if section else {}


def check_section(section: Any) -> dict[str, Any]:
    """`section` if it is a mapping of plugin to options; ConfigError if not."""
    if not isinstance(section, Mapping):
        raise options.ConfigError(f"additional_config.{SECTION} must map a plugin to its options, got {section!r}.")
    return dict(section)


def read_selection(value: Any) -> tuple[list[str], dict[str, Any]]:
    """Names and options out of what `--plugins` was given.

    Args:
        value: "a,b", the path of a YAML file, or, out of vLLM's `--config` file, a list or mapping.

    Raises:
        ConfigError: the file is missing, malformed or of the wrong shape, or a name is empty.
    """
    source = "plugins"
    if isinstance(value, str):
        if not (value.endswith((".yaml", ".yml")) or "/" in value):
            value = [name.strip() for name in value.split(",")]
        else:
            source = f"plugin file '{value}'"
            value = catalogue.read_yaml(Path(value).expanduser(), "plugin file")
            if not isinstance(value, Mapping):
                raise options.ConfigError(
                    f"{source} must map plugins to their options (`quest: {{budget: 2048}}` or `quest:`), "
                    f"not hold {'nothing' if value is None else 'a ' + type(value).__name__}."
                )
    if isinstance(value, Mapping):
        return [str(name) for name in value], {str(k): v for k, v in value.items() if v is not None}
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise options.ConfigError(f"{source} must be plugin names separated by commas or a YAML file, got {value!r}.")
    return value, {}


def override(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`low` overridden by `high`, nested mappings key by key."""
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = override(merged[key], value) if both else value
    return merged


def agrees(actual: Any, needed: Any) -> bool:
    """Whether no key that both mappings have differs."""
    return isinstance(actual, Mapping) and all(actual.get(key, value) == value for key, value in needed.items())


def flag_tokens(name: str, value: Any) -> list[str]:
    """One engine argument as command-line tokens."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, json.dumps(value) if isinstance(value, (dict, list)) else str(value)]


def dotted_tokens(flag: str, mapping: Mapping[str, Any]) -> list[str]:
    """`mapping` as `--flag.key.key value` tokens, which vLLM's parser merges with the user's own.

    An empty mapping on the way is written out (`--flag.key '{}'`): that is how a plugin without options is selected.
    """
    if any(not _plain(key) for key in mapping):
        return [f"--{flag}", json.dumps(mapping)]
    tokens: list[str] = []
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            tokens += dotted_tokens(f"{flag}.{key}", value)
        else:
            tokens += [f"--{flag}.{key}", _encode(value)]
    return tokens


def _plain(key: Any) -> bool:
    """Whether a key survives in a dotted flag."""
    return isinstance(key, str) and re.fullmatch(r"[A-Za-z0-9_-]+", key) is not None


def _encode(value: Any) -> str:
    """A value as vLLM's parser reads it back: bare text only where it cannot be taken for a number or JSON."""
    bare = isinstance(value, str) and re.fullmatch(r"[A-Za-z_/.][A-Za-z0-9_/.:-]*", value)
    if bare and value not in ("true", "false", "null", "NaN", "Infinity"):
        return value
    return json.dumps(value)
