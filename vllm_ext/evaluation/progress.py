"""Progress on stderr: rich bars on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bars(label: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function of (what, done, total) that shows one bar for each `what`.

    Args:
        label: put before every bar, e.g. the row's name.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what, done, total: print(f"{label}: {what}: {done}/{total}", file=sys.stderr, flush=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, int] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = int(progress.add_task(f"{label}: {what}", total=total))
            progress.update(tasks[what], completed=done)  # type: ignore[arg-type]

        yield advance
