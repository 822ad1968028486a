"""`--plugins` on vLLM's own command line: rewritten into stock arguments before vLLM's parser reads them.

vLLM loads plugins while it builds the parser, and reads `sys.argv` afterwards. The same goes for `plugins:` in the
file of vLLM's `--config`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from vllm_ext import config
from vllm_ext.options import ConfigError

COMMANDS = (("serve",), ("bench", "throughput"), ("bench", "latency"), ("bench", "startup"), ("run-batch",))
"""Commands of `vllm` that build an engine from engine arguments."""
_SCRIPTS = ("vllm/entrypoints/openai/api_server.py", "vllm/entrypoints/launchers/api_server/entry.py")
_MAIN = "vllm/entrypoints/cli/main.py"
# where vLLM takes the same setting from a second flag
_ALIASES = {"--attention-backend": (("--attention-config", "backend"), ("-ac", "backend"))}


def is_vllm(argv: Sequence[str]) -> bool:
    """Whether a process with these `sys.argv` is a command of vLLM that builds an engine."""
    return bool(argv) and _words(argv) is not None


def _words(argv: Sequence[str]) -> int | None:
    """How many words of `argv` name the command, or None if it is not one of vLLM's engine commands."""
    script = PurePath(argv[0])
    if script.as_posix().endswith(_SCRIPTS):
        return 1
    if script.stem == "vllm" or script.as_posix().endswith(_MAIN):
        for command in COMMANDS:
            if tuple(argv[1 : 1 + len(command)]) == command:
                return 1 + len(command)
    return None


@dataclass
class _Scan:
    """What a command line says that concerns plugins, and the tokens that do not."""

    plugins: list[Any] = field(default_factory=list)
    additional: dict[str, Any] = field(default_factory=dict)
    dotted: list[str] = field(default_factory=list)
    given: dict[str, list[str]] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)

    def option(self, token: str, following: Sequence[str]) -> int:
        """Take one token that begins with a dash; returns how many tokens it used up."""
        name, has_value, value = token.partition("=")
        head, dot, path = name.partition(".")
        head = head.replace("_", "-")
        if head != "--additional-config" and (head != "--plugins" or dot):
            self.given.setdefault(head + dot + path, []).append(value if has_value else "".join(following[:1]))
            self.rest.append(token)
            return 1
        if not has_value:
            if not following:
                raise ConfigError(f"{token} needs a value; give one after it.")
            value = following[0]
        if head == "--plugins":
            self.plugins.append(value)
        elif dot:
            self.dotted += [f"{head}.{path}", value]
        else:
            self.additional = config.override(self.additional, _json(value))
        return 1 if has_value else 2


def _json(value: Any, flag: str = "--additional-config") -> dict[str, Any]:
    """The mapping that a flag was given as JSON."""
    try:
        loaded = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ConfigError(f"{flag} is not valid JSON ({error}); correct it.") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{flag} must be a JSON object, got {value}.")
    return loaded


def _scan(tokens: Sequence[str], config_file: Mapping[Any, Any]) -> _Scan:
    """Sort the tokens after the command's name; `--config` file first, since the command line overrides it."""
    scan = _Scan()
    for key, value in config_file.items():
        name = str(key).replace("_", "-")
        if name == "plugins":
            scan.plugins.append(value)
        elif name == "additional-config":
            scan.additional = _json(value)
        else:
            text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
            scan.given.setdefault(f"--{name}", []).append(text)
    i = 0
    while i < len(tokens):
        if tokens[i].startswith("-"):
            i += scan.option(tokens[i], tokens[i + 1 :])
        else:
            scan.rest.append(tokens[i])
            i += 1
    return scan


def _concerns_us(tokens: Sequence[str], config_file: Mapping[Any, Any]) -> bool:
    """Whether anything here may select a plugin; if not, a stock command line is not even looked at."""
    text = "\n".join([*tokens, *map(str, config_file), str(config_file.values())]).replace("-", "_").lower()
    return re.search(rf"^(__)?plugins\b|{config.SECTION}", text, re.MULTILINE) is not None


def _config_file(tokens: Sequence[str]) -> dict[Any, Any]:
    """The content of vLLM's own `--config` file; empty where vLLM itself will complain about it."""
    if "--config" not in tokens[:-1]:
        return {}
    try:
        content = yaml.safe_load(Path(tokens[tokens.index("--config") + 1]).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _merge_dotted(scan: _Scan) -> dict[str, Any]:
    """`additional_config` as the user means it: JSON overridden by the dotted flags, read by vLLM's own parser."""
    if not scan.dotted:
        return scan.additional
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--additional-config", type=json.loads)
    return config.override(scan.additional, parser.parse_args(scan.dotted).additional_config)


def _flag_values(scan: _Scan, flag: str) -> list[tuple[str, str]]:
    """How the user set a flag: (as spelled, value), with the second flags that vLLM takes for it."""
    found = [(f"{flag} {value}", value) for value in scan.given.get(flag, [])]
    for alias, key in _ALIASES.get(flag, ()):
        found += [(f"{alias}.{key} {value}", value) for value in scan.given.get(f"{alias}.{key}", [])]
        for value in scan.given.get(alias, []):
            inner = _json(value, alias)
            found += [(f"{alias} {value}", str(inner[key]))] if inner.get(key) is not None else []
    return found


def _check_conflicts(scan: _Scan, expansion: config.Expansion) -> None:
    """Refuse flags of the user that say something else than the plugins need."""
    names = ",".join(expansion.plugins)
    for name, value in expansion.stock_args.items():
        flag, *wanted = config.flag_tokens(name, value)
        positive = f"--{name.replace('_', '-')}"
        for spelled, text in _flag_values(scan, positive) if wanted else []:
            if text.lower() != wanted[0].lower():
                raise ConfigError(
                    f"{spelled} conflicts with --plugins {names}, which sets {flag} {wanted[0]}; "
                    f"drop {spelled.split()[0]}, or change the plugin's options."
                )
        opposite = f"--no-{positive[2:]}" if flag == positive else positive
        if not wanted and opposite in scan.given:
            raise ConfigError(f"{opposite} conflicts with --plugins {names}, which sets {flag}; drop {opposite}.")


def _check_switched_on(scan: _Scan, section: Mapping[str, Any]) -> None:
    """Options without `--plugins` must come with the arguments that switch the plugin on."""
    expansion = config.expand(list(section), section)
    for name, value in expansion.stock_args.items():
        flag, *wanted = config.flag_tokens(name, value)
        values = [text.lower() for _, text in _flag_values(scan, flag)]
        if (flag not in scan.given and not values) or (wanted and wanted[0].lower() not in values):
            raise ConfigError(
                f"options of {', '.join(section)} are given, but {' '.join([flag, *wanted])} is not, so the plugin "
                f"would stay off; add --plugins {','.join(section)}."
            )


def rewrite(argv: list[str]) -> config.Expansion | None:
    """Replace `--plugins` in `argv` (as `sys.argv`) by the stock arguments it stands for, in place.

    Returns:
        The expansion, or None if `argv` selects no plugin (then it is unchanged).

    Raises:
        ConfigError: anything wrong with the selection, its options, or flags that contradict it.
    """
    words = _words(argv) if argv else None
    if words is None:
        return None
    config_file = _config_file(argv[words:])
    if not _concerns_us(argv[words:], config_file):
        return None
    scan = _scan(argv[words:], config_file)
    additional = _merge_dotted(scan)
    section = config.check_section(additional.pop(config.SECTION, {}))
    for key in additional:
        if key.lower().replace("-", "_") == config.SECTION:
            raise ConfigError(f"additional-config has the key '{key}'; write {config.SECTION}, with an underscore.")
    if not scan.plugins:
        if section:
            _check_switched_on(scan, section)
        return None
    if len(scan.plugins) > 1:
        raise ConfigError("--plugins is given more than once; give it once, with commas between the names.")
    names, given = config.read_selection(scan.plugins[0])
    expansion = config.expand(names, config.override(given, section))
    _check_conflicts(scan, expansion)
    stock = [t for name, v in expansion.stock_args.items() for t in _missing(scan, name, v)]
    merged = config.override(additional, expansion.engine_args["additional_config"])
    argv[words:] = [*scan.rest, *stock, *config.dotted_tokens("additional-config", merged)]
    return expansion


def _missing(scan: _Scan, name: str, value: Any) -> list[str]:
    """The tokens of one engine argument, unless the user gave the same already."""
    tokens = config.flag_tokens(name, value)
    return [] if tokens[0] in scan.given or _flag_values(scan, tokens[0]) else tokens


def describe(expansion: config.Expansion) -> str:
    """The expansion as one line for the log."""
    return f"--plugins {','.join(expansion.plugins)} stands for: {shlex.join(expansion.cli)}"
