"""The entry point of the group `vllm.general_plugins`: what vllm-ext changes in a process that loads vLLM.

Three methods of EngineArgs are wrapped (the flag `--plugins`, early refusals, checks and banner), and the attention
backend gets its name. With no plugin selected, each wrapper passes straight through. If vLLM is not the version that
`hooks.TABLE` describes, nothing is changed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from vllm_ext import command_line, config
from vllm_ext.backend_name import PATHS as BACKENDS
from vllm_ext.options import ConfigError

_state: Literal["new", "busy", "active", "declined"] = "new"
_expansion: config.Expansion | None = None


def register() -> None:
    """Install vllm-ext into this process; idempotent.

    Raises:
        SystemExit: with code 2, if `--plugins` on vLLM's command line is wrong. Nothing else is ever raised.
    """
    global _state
    if _state != "new":
        return
    _state = "busy"
    try:
        reason = _install()
    except Exception as error:  # stock serving must go on, whatever is broken here
        reason = f"{type(error).__name__}: {error}"
    _state = "declined" if reason else "active"
    if reason:
        _log().warning("vllm-ext is off and vLLM is unchanged: %s", reason)
    else:
        _rewrite_command_line()


def state() -> str:
    """ "new", "active" or "declined"."""
    return _state


def _log() -> Any:
    """vLLM's logger, or a plain one where vLLM has none."""
    import logging

    try:
        from vllm.logger import init_logger
    except ImportError:
        return logging.getLogger("vllm_ext")
    return init_logger("vllm.vllm_ext")


def _install() -> str:
    """Probe vLLM, then rebind; returns why not, or "". Takes back what was rebound if something fails on the way."""
    from vllm_ext import backend_name, hooks, workers

    if reason := hooks.refusal():
        return reason
    undo: list[Callable[[], None]] = []
    try:
        from vllm.engine.arg_utils import EngineArgs

        undo += backend_name.install(hooks.platform_name())
        undo += workers.install(load=False)
        for name, wrap in (
            ("add_cli_args", _wrap_add_cli_args),
            ("__post_init__", _wrap_post_init),
            ("create_engine_config", _wrap_create_engine_config),
        ):
            own = vars(EngineArgs)[name]
            setattr(EngineArgs, name, wrap(getattr(EngineArgs, name)))
            undo.append(functools.partial(setattr, EngineArgs, name, own))
    except BaseException:
        for action in reversed(undo):
            action()
        raise
    return ""


def _wrap_add_cli_args(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        group = parser.add_argument_group("Plugins", description="Methods of vllm-ext; `vllm-ext list` describes them.")
        group.add_argument(
            "--plugins", nargs="*", action=_Unexpanded, default=argparse.SUPPRESS, metavar="NAMES", help=_help()
        )
        return parser

    return staticmethod(add_cli_args)


def _help() -> str:
    """Help of `--plugins`, with the names if the catalogue can be read."""
    from vllm_ext import catalogue

    try:
        names = f" ({', '.join(catalogue.load())})"
    except ConfigError:
        names = ""
    return (
        f"Plugins to switch on: names separated by commas{names}, or a YAML file that maps plugins to options. "
        "Single options: --additional-config.vllm_ext.PLUGIN.OPTION VALUE. `vllm-ext list` describes both."
    )


class _Unexpanded(argparse.Action):
    """`--plugins` in the parser: seen only if `register` did not take it out of sys.argv before."""

    def __call__(self, parser: Any, *_: Any, **__: Any) -> None:
        if _expansion is None:  # else it is the line `plugins:` of a --config file, which is expanded already
            parser.error(
                "--plugins is not available in this form here; write it out in full, or use the arguments that "
                "`vllm-ext args NAMES` prints"
            )


def _wrap_post_init(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        if _concerns_us(self):
            with _exit_code():
                _selected(self)
            _log_expansion()
        original(self)

    return __post_init__


def _wrap_create_engine_config(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _concerns_us(self):
            return original(self, *args, **kwargs)
        with _exit_code():
            plugins = _selected(self)
        vllm_config = original(self, *args, **kwargs)
        with _exit_code():
            for plugin in plugins.values():
                plugin.check(vllm_config)
        _announce(plugins, vllm_config)
        return vllm_config

    return create_engine_config


def _concerns_us(engine_args: Any) -> bool:
    """Whether engine arguments select plugins, or our backend without one; cheap, since stock engines ask too."""
    additional = engine_args.additional_config
    return (isinstance(additional, Mapping) and config.SECTION in additional) or (
        _name(engine_args.attention_backend) in BACKENDS
    )


def _name(value: Any) -> str:
    """A value or enum member as upper-case text, to compare engine arguments."""
    return str(getattr(value, "name", value)).upper()


def _selected(engine_args: Any) -> dict[str, Any]:
    """The plugins that engine arguments select, after all checks that need no VllmConfig."""
    plugins = config.from_additional(engine_args.additional_config)
    backend = _name(engine_args.attention_backend)
    if not plugins and backend in BACKENDS:
        raise ConfigError(
            f"attention_backend={backend} needs a plugin; select one with --plugins, e.g. --plugins quest."
        )
    for name, plugin in plugins.items():
        if hasattr(plugin, "early"):
            plugin.early(engine_args)
        for arg, value in plugin.engine_args().items():
            actual = getattr(engine_args, arg)
            if arg == "attention_backend" and actual is None:
                actual = _attention_config_backend(engine_args)
            if isinstance(value, Mapping) and actual and config.agrees(actual, value):
                continue
            if _name(actual) != _name(value):
                raise ConfigError(
                    f"plugin '{name}' needs {arg}={value}, but it is {_name(actual)}; use --plugins {name}, or "
                    f"LLM(model, **vllm_ext.engine_args('{name}'))."
                )
    if plugins:
        check_model_directory(engine_args.model)
    return plugins


def _attention_config_backend(engine_args: Any) -> Any:
    """The same setting given as `--attention-config.backend`."""
    attention = engine_args.attention_config
    return attention.get("backend") if isinstance(attention, Mapping) else getattr(attention, "backend", None)


def check_model_directory(model: str) -> None:
    """Refuse a local model directory that cannot be read; names of hubs and stores are left to vLLM.

    Raises:
        ConfigError: no such directory, or no readable config in it.
    """
    path = Path(model).expanduser()
    local = path.is_absolute() or model.startswith(("./", "../", "~")) or path.exists()
    if not local or "://" in model or path.suffix == ".gguf":
        return
    if not path.is_dir():
        raise ConfigError(
            f"model directory '{model}' does not exist; give a directory with config.json, or a model name."
        )
    if (path / "params.json").exists():
        return
    try:
        if not isinstance(json.loads((path / "config.json").read_text(encoding="utf-8")), dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"model directory '{model}' has no readable config.json ({text}); give a directory of Hugging Face files."
        ) from None


@contextlib.contextmanager
def _exit_code() -> Iterator[None]:
    """Under vLLM's command line a ConfigError ends the process with one sentence and code 2."""
    try:
        yield
    except ConfigError as error:
        if not command_line.is_vllm(sys.argv):
            raise
        _die(error)


def _die(error: ConfigError) -> None:
    print(f"vllm-ext: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None


def _announce(plugins: Mapping[str, Any], vllm_config: Any) -> None:
    """Banner (once: not in the API server processes that the main process starts) and metrics of a new engine."""
    if not plugins:
        return
    from vllm_ext import banner, kv_metrics, metrics, spec_metrics, totals, workers

    if any(hasattr(plugin, "attach") for plugin in plugins.values()):
        workers.install(load=True)
    if multiprocessing.parent_process() is None:
        banner.print_banner(plugins, vllm_config)
    metrics.install_collector(vllm_config)
    if vllm_config.speculative_config is not None:
        totals.install_collector(vllm_config, spec_metrics.FAMILY, spec_metrics.HELP)
    if any(plugin.kind == "kv" for plugin in plugins.values()):
        totals.install_collector(vllm_config, kv_metrics.FAMILY, kv_metrics.HELP)


def _rewrite_command_line() -> None:
    """Expand `--plugins` in sys.argv. Children of vLLM inherit the rewritten arguments."""
    global _expansion
    if multiprocessing.parent_process() is not None:
        return
    try:
        _expansion = command_line.rewrite(sys.argv)
    except ConfigError as error:
        _die(error)
    except Exception as error:  # a defect here must not take a stock command line down
        _log().warning(
            "vllm-ext cannot read this command line (%s: %s) and leaves it as it is.", type(error).__name__, error
        )


@functools.cache
def _log_expansion() -> None:
    """Log once what `--plugins` stood for; not while it is expanded, since vLLM sets its logging up after that."""
    if _expansion is not None:
        _log().info("vllm-ext: %s", command_line.describe(_expansion))
