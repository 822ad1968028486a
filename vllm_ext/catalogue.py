"""The catalogue of plugins: `plugins.yaml` as typed entries. Imports neither torch nor vLLM."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vllm_ext.options import ConfigError, did_you_mean

PATH = Path(__file__).with_name("plugins.yaml")
_REQUIRED = ("kind", "summary", "paper", "class", "training")
_OPTIONAL = ("conflicts", "evidence")
EXCLUSIVE = ("attention", "kv", "drafter", "verifier", "length")
"""Kinds of which one plugin can be on at a time: each conflicts with the others, without saying so."""
_SLOT = {"kv": "attention"}
"""Kinds that also exclude another kind: KV managers bring an attention backend of their own."""


@dataclass(frozen=True)
class Plugin:
    """One entry of the catalogue.

    Attributes:
        name: what `--plugins` takes.
        kind: what it changes, e.g. "attention".
        summary, paper: one line each.
        class_path: `package.module:Class` of the options dataclass.
        training: what must be trained or calibrated before use, or "none".
        conflicts: plugins that cannot be on at the same time.
        evidence: per platform, where its results are recorded.
    """

    name: str
    kind: str
    summary: str
    paper: str
    class_path: str
    training: str
    conflicts: tuple[str, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def cls(self) -> Any:
        """The options dataclass, imported on demand.

        Raises:
            ConfigError: its module cannot be imported here, or holds no such dataclass.
        """
        module, _, name = self.class_path.partition(":")
        try:
            cls = getattr(importlib.import_module(module), name)
        except Exception as error:  # a broken plugin may raise anything while it is imported
            raise ConfigError(
                f"plugin '{self.name}' cannot be loaded ({type(error).__name__}: {error}); "
                "run `vllm-ext doctor` to see what is missing."
            ) from error
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise ConfigError(
                f"plugin '{self.name}': {self.class_path} is no dataclass; correct `class` in plugins.yaml."
            )
        return cls


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that refuses a key given twice, where PyYAML keeps the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file.

    Args:
        path: the file.
        what: what the file is, for the error, e.g. "plugin file".

    Raises:
        ConfigError: the file cannot be read, or is no YAML; the sentence names the line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(
            f"cannot read {what} '{path}' ({error.strerror}); give the path of a readable file."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{what} '{path}' is not UTF-8 text; give a YAML file.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{what} '{path}' is not valid YAML{where} ({problem}); correct that line.") from None


def _entry(name: Any, raw: Any) -> Plugin:
    """A checked entry of the catalogue."""
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(f"plugins.yaml: plugin name {name!r} must be lower case letters, digits and underscores.")
    if not isinstance(raw, dict):
        raise ConfigError(f"plugins.yaml: entry '{name}' must be a mapping, not {raw!r}.")
    for key in raw:
        if key not in _REQUIRED + _OPTIONAL:
            raise ConfigError(
                f"plugins.yaml: unknown key '{key}' in '{name}'{did_you_mean(str(key), _REQUIRED + _OPTIONAL)}"
            )
    for key in _REQUIRED:
        if not isinstance(raw.get(key), str) or not raw[key].strip():
            raise ConfigError(f"plugins.yaml: entry '{name}' needs a text for '{key}'.")
    if not re.fullmatch(r"[\w.]+:\w+", raw["class"]):
        raise ConfigError(f"plugins.yaml: class of '{name}' must read package.module:Class, got '{raw['class']}'.")
    conflicts, evidence = raw.get("conflicts") or [], raw.get("evidence") or {}
    if not isinstance(conflicts, list) or not all(isinstance(c, str) for c in conflicts):
        raise ConfigError(f"plugins.yaml: conflicts of '{name}' must be a list of plugin names.")
    if not isinstance(evidence, dict) or not all(isinstance(e, list) for e in evidence.values()):
        raise ConfigError(f"plugins.yaml: evidence of '{name}' must map a platform to a list of records.")
    texts = {key: raw[key].strip() for key in _REQUIRED if key != "class"}
    return Plugin(name=name, class_path=raw["class"], conflicts=tuple(conflicts), evidence=evidence, **texts)


@functools.cache
def load(path: Path = PATH) -> dict[str, Plugin]:
    """The catalogue, name -> entry, in the file's order.

    Raises:
        ConfigError: the file is missing or malformed; the sentence names the entry and the key.
    """
    raw = read_yaml(path, "catalogue")
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(f"catalogue '{path}' must be a mapping of plugin name to entry.")
    plugins = {name: _entry(name, entry) for name, entry in raw.items()}
    for plugin in plugins.values():
        for other in plugin.conflicts:
            if other not in plugins:
                known = did_you_mean(other, list(plugins))
                raise ConfigError(f"plugins.yaml: '{plugin.name}' conflicts with unknown plugin '{other}'{known}")
            if plugin.name not in plugins[other].conflicts:
                raise ConfigError(
                    f"plugins.yaml: '{plugin.name}' conflicts with '{other}', but not the other way round."
                )
    for name, plugin in plugins.items():
        if plugin.kind in EXCLUSIVE:
            slot = _SLOT.get(plugin.kind, plugin.kind)
            same = [n for n, p in plugins.items() if _SLOT.get(p.kind, p.kind) == slot and n != name]
            plugins[name] = dataclasses.replace(plugin, conflicts=tuple(dict.fromkeys([*plugin.conflicts, *same])))
    return plugins


def get(name: str) -> Plugin:
    """The entry of one plugin.

    Raises:
        ConfigError: no such plugin; the sentence suggests the closest name.
    """
    plugins = load()
    if name not in plugins:
        raise ConfigError(f"unknown plugin '{name}'{did_you_mean(name, list(plugins))}")
    return plugins[name]
