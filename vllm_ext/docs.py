"""The generated parts of the documentation: `python -m vllm_ext.docs`, or `--check` to see whether they are current.

A generated part stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` in a Markdown file of the repository.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_ext.options import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join([row(head), row(["---"] * len(head)), *map(row, rows)])


def plugins_table() -> str:
    """The plugins of the catalogue, one row each."""
    from vllm_ext import catalogue

    rows = [
        (f"`{p.name}`", p.kind, p.summary, p.paper, p.training, ", ".join(f"`{c}`" for c in p.conflicts) or "none")
        for p in catalogue.load().values()
    ]
    return table(("plugin", "kind", "what it does", "paper", "training", "not together with"), rows)


SECTIONS: dict[str, dict[str, Callable[[], str]]] = {"README.md": {"plugins": plugins_table}}
"""File -> name of the marker -> what makes the text between the markers."""


def fill(text: str, name: str, content: str) -> str:
    """`text` with the part of marker `name` replaced.

    Raises:
        ConfigError: the markers are not there exactly once.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ConfigError(f"the markers {begin} and {end} must be in the file once, one after the other.")
    return pattern.sub(lambda match: f"{begin}\n{content}\n{end}", text)


def generate(root: Path = ROOT) -> dict[Path, str]:
    """Path -> text as it should be, for every file with generated parts.

    Raises:
        ConfigError: a file or marker is missing, or the catalogue is malformed.
    """
    wanted = {}
    for name, sections in SECTIONS.items():
        path = root / name
        if not path.is_file():
            raise ConfigError(f"{path} is missing; run this from a checkout of the repository.")
        text = path.read_text(encoding="utf-8")
        for marker, make in sections.items():
            text = fill(text, marker, make())
        wanted[path] = text
    return wanted


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, or with `--check` only compare; returns the exit code (1 = not current)."""
    parser = argparse.ArgumentParser(prog="python -m vllm_ext.docs", description="Generated parts of the documents.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is not current")
    check = parser.parse_args(argv).check
    try:
        stale = [path for path, text in generate().items() if path.read_text(encoding="utf-8") != text]
        for path in stale:
            if not check:
                path.write_text(generate()[path], encoding="utf-8")
            print(f"{path.name}: {'not current; run python -m vllm_ext.docs' if check else 'written'}")
    except ConfigError as error:
        print(f"vllm-ext: {error}", file=sys.stderr)
        return 2
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
