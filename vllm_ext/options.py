"""Typed plugin options: fields of a frozen dataclass, validated from plain dictionaries.

This module imports neither torch nor vLLM: it runs while vLLM's command line is being built.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A wrong option, plugin name or combination; its text is one sentence that names the remedy."""


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[Any] | None = None,
    paper: Any = None,
) -> Any:
    """Declare one option as a dataclass field.

    Args:
        default: value when the user says nothing; a list or tuple is stored as a tuple.
        help: one line for `vllm-ext list` and the docs.
        unit: "tokens", "pages", ... or "" for a pure number.
        minimum, maximum: inclusive bounds for numbers.
        choices: the allowed values, if they can be listed.
        paper: the value the paper uses, if it differs from `default`.
    """
    meta = {"help": help, "unit": unit, "minimum": minimum, "maximum": maximum, "choices": choices, "paper": paper}
    return dataclasses.field(default=tuple(default) if isinstance(default, list) else default, metadata=meta)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`"; did you mean X?"` for the closest known word, or the list of all known words."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"


def type_name(annotation: Any) -> str:
    """A readable name of an option's type, e.g. `int | None` or `tuple of int`."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return " | ".join("null" if a is type(None) else type_name(a) for a in typing.get_args(annotation))
    if origin is tuple:
        return f"list of {type_name(typing.get_args(annotation)[0])}"
    return str(getattr(annotation, "__name__", annotation))


def _coerce(annotation: Any, value: Any) -> Any:
    """`value` as the annotated type; raises TypeError if it is not one. Booleans are not integers here."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        for arm in typing.get_args(annotation):
            try:
                return _coerce(arm, value)
            except TypeError:
                continue
        raise TypeError
    if annotation is type(None):
        if value is None or value in ("null", "none", "None"):
            return None
        raise TypeError
    if origin is tuple:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = (value,)
        if isinstance(value, str):
            value = [int(v) if v.strip().lstrip("-").isdigit() else v for v in value.split(",")]
        if not isinstance(value, Sequence):
            raise TypeError
        return tuple(_coerce(typing.get_args(annotation)[0], v) for v in value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation in (int, float, str, bool) and type(value) is annotation:
        return value
    raise TypeError


def build(cls: type[T], plugin: str, values: Mapping[str, Any] | None) -> T:
    """An instance of the options dataclass `cls` from a mapping (JSON or YAML types).

    Raises:
        ConfigError: unknown option, wrong type or value out of bounds; the sentence names
            `<plugin>.<option>` and the remedy.
    """
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ConfigError(f"options of plugin '{plugin}' must be a mapping of option to value, not {values!r}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    clean: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            why = getattr(cls, "unavailable", {}).get(name)
            reason = f": {why}" if why else did_you_mean(str(name), list(fields))
            raise ConfigError(f"plugin '{plugin}' has no option '{name}'{reason}")
        meta = fields[name].metadata
        try:
            clean[name] = _coerce(hints[name], value)
        except TypeError:
            raise ConfigError(
                f"{plugin}.{name} must be of type {type_name(hints[name])}, got {value!r} ({type(value).__name__})."
            ) from None
        check_bounds(f"{plugin}.{name}", clean[name], meta)
    return cls(**clean)


def check_bounds(name: str, value: Any, meta: Mapping[str, Any]) -> None:
    """Raise ConfigError if `value` breaks the bounds or choices declared with `option`."""
    choices, low, high = meta.get("choices"), meta.get("minimum"), meta.get("maximum")
    if choices is not None and value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}.")
    for v in value if isinstance(value, tuple) else (value,):
        if not isinstance(v, (int, float)) or isinstance(v, bool):
            continue
        if low is not None and v < low:
            raise ConfigError(f"{name} must be at least {low}, got {v}.")
        if high is not None and v > high:
            raise ConfigError(f"{name} must be at most {high}, got {v}.")


def describe(cls: type) -> list[dict[str, Any]]:
    """Name, type, default, unit, help, bounds and the paper's value of each option, in declaration order.

    `paper_values` of the class states the paper's value of options that it shares with other methods.
    """
    hints, papers = typing.get_type_hints(cls), getattr(cls, "paper_values", {})
    rows = []
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        m = dict(f.metadata) | ({"paper": papers[f.name]} if f.name in papers else {})
        default = list(f.default) if isinstance(f.default, tuple) else f.default
        rows.append({"name": f.name, "type": type_name(hints[f.name]), "default": default, **m})
    return rows


def bounds(option: dict[str, Any]) -> str:
    """Bounds or choices of an option, one of the rows of `describe`, as text."""
    if option["choices"]:
        return " | ".join(map(str, option["choices"]))
    low, high = option["minimum"], option["maximum"]
    if low is not None and high is not None:
        return f"{low} .. {high}"
    return f">= {low}" if low is not None else f"<= {high}" if high is not None else ""
