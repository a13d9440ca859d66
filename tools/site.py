"""MkDocs hooks: links from docs/ to files of the repository that are no pages become the file's path, as code.

`REPOSITORY=https://...` makes them links to it instead. Links between pages stay as they are, and MkDocs checks them;
that the files exist, a test says (tests/test_readme.py).
"""

from __future__ import annotations

import os
import posixpath
import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")
SHOWN = (".md", ".png", ".gif", ".svg")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite what leads out of docs/."""
    folder = posixpath.dirname(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        place = posixpath.normpath(posixpath.join("docs", folder, target))
        if place.startswith("docs/") and place.endswith(SHOWN):
            return match.group(0)
        repository = os.environ.get("REPOSITORY")
        if repository:
            return f"[{text}]({repository.rstrip('/')}/blob/main/{place}{anchor or ''})"
        return text if text.strip("`") in place else f"{text} (`{place}`)"

    return LINK.sub(rewritten, markdown)
