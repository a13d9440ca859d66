"""A bar for runs whose length is known, or none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Tick = Callable[[str], None]  # what is done now; each call is one of the total


def silent(what: str) -> None:
    """No bar."""


@contextlib.contextmanager
def bar(show: bool, total: int, title: str = "compare") -> Iterator[Tick]:
    """A bar of `total` ticks that is gone when the block ends, however it ends."""
    if not show:
        yield silent
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda what: progress.update(task, advance=1, description=what)
