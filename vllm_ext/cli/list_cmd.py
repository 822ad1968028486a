"""`vllm-ext list`: the catalogue with every option."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from vllm_ext import catalogue, options
from vllm_ext.options import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("list")(list_plugins)


def list_plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """List the plugins: kind, paper, options with type, default and bounds, conflicts, evidence."""
    rows = describe()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console

    console = Console()
    for row in rows:
        _print(console, row)


def describe() -> list[dict[str, Any]]:
    """The catalogue as JSON types; a plugin that cannot be loaded has `problem` and no options."""
    rows = []
    for plugin in catalogue.load().values():
        row: dict[str, Any] = {
            "name": plugin.name,
            "kind": plugin.kind,
            "summary": plugin.summary,
            "paper": plugin.paper,
            "training": plugin.training,
            "conflicts": list(plugin.conflicts),
            "evidence": {k: list(v) for k, v in plugin.evidence.items()},
            "resident": None,
            "options": [],
            "problem": None,
        }
        try:
            row["options"] = options.describe(plugin.cls())
            row["resident"] = plugin.cls()().plan() if plugin.kind == "kv" else None
        except ConfigError as error:
            row["problem"] = str(error)
        rows.append(row)
    return rows


def _print(console: Any, row: dict[str, Any]) -> None:
    """One plugin: its facts, then a table of its options."""
    from rich.markup import escape
    from rich.table import Table

    console.print(f"[bold]{row['name']}[/bold] ({escape(row['kind'])}): {escape(row['summary'])}")
    evidence = "; ".join(f"{k}: {', '.join(map(str, v)) or 'none'}" for k, v in row["evidence"].items())
    facts = (
        ("paper", row["paper"]),
        ("training", row["training"]),
        ("conflicts", ", ".join(row["conflicts"]) or "none"),
    )
    resident = [("resident", row["resident"])] if row["resident"] else []
    for label, text in (*facts, *resident, ("evidence", evidence or "none")):
        console.print(f"  {label:<10}{escape(text)}", highlight=False)
    if row["problem"]:
        console.print(f"  [red]{escape(row['problem'])}[/red]\n")
        return
    table = Table(
        "option", "type", "unit", "default", "bounds", "meaning", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    table.columns[0].no_wrap = True
    for option in row["options"]:
        default = "null" if option["default"] is None else str(option["default"])
        help_text = option["help"] + (f" (paper: {option['paper']})" if option["paper"] is not None else "")
        cells = (option["name"], option["type"], option["unit"], default, options.bounds(option), help_text)
        table.add_row(*map(escape, cells))
    from rich.padding import Padding

    console.print(Padding(table, (0, 0, 1, 2)))
