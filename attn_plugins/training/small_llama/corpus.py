"""Text that every Python has: the standard library's sources and the interpreter's help topics; no download."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# tests are not installed everywhere; `encodings` is tables of characters; the topics are read as text, below
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
HELD_OUT_ONE_IN = 20


def documents() -> Iterator[tuple[str, str]]:
    """(name, text) of every document, in order of the names within each kind: modules by dotted name, help topics."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED.intersection(parts):
            yield ".".join(parts), path.read_text(encoding="utf-8", errors="replace")
    for name in sorted(topics):
        yield f"pydoc_data.topics.{name}", topics[name]


def is_held_out(name: str) -> bool:
    """Whether the document of this name is kept for evaluation: decided by its name, so on every machine alike."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def texts(split: str) -> list[str]:
    """The texts of one split, "train" or "held_out", empty ones left out. Raises ValueError for another name."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split={split!r}: choose 'train' or 'held_out'")
    return [text for name, text in documents() if text.strip() and is_held_out(name) == (split == "held_out")]
