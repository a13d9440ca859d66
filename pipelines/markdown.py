"""Markdown that commands write: tables, and what stands between `<!-- name:begin -->` and `<!-- name:end -->`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a bar inside a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def filled(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of `name` replaced.

    Raises:
        ValueError: the markers are missing.
    """
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"there are no lines <!-- {name}:begin --> and <!-- {name}:end --> to put a table between")
    return pattern.sub(lambda found: f"{found[1]}{content.rstrip()}\n{found[2]}", text)


def fill(page: Path, name: str, content: str) -> Path:
    """The same, of a file.

    Raises:
        ValueError: as `filled`; the message names the file.
    """
    try:
        text = filled(page.read_text(encoding="utf-8"), name, content)
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from None
    page.write_text(text, encoding="utf-8")
    return page
