"""What was measured is not measured again: numbers by key, a line each in a file that grows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

MUST_AGREE = ("machine", "torch", "dtype", "version")


class Memory:
    """Args:
        path: of the file, read if it is there; None: nothing is kept beyond this object.
        about: where it is measured and with what; a file of another machine or version is refused. `self.about` is that
            of the file's first numbers: their commit and date are the ones to tell.

    Raises:
        ValueError: a file of something else, of another machine or of another version.
    """

    def __init__(self, path: Path | None = None, about: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.about = dict(about or {})
        self._known: dict[str, list[float | None]] = {}
        if path is not None and path.is_file():
            self._read(path)
        elif path is not None:
            path.write_text(json.dumps({"about": self.about}) + "\n", encoding="utf-8")

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def of(self, key: str, measured: Callable[[], Sequence[float | None]]) -> list[float | None]:
        """The numbers of `key`; where they are not known, `measured` is called and what it gives is kept."""
        if key not in self._known:
            self._known[key] = list(measured())
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, self._known[key]]) + "\n")
        return self._known[key]

    def _read(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines()
        whole = [row for line in lines if (row := _parsed(line)) is not None]
        if not whole or not isinstance(whole[0], dict) or "about" not in whole[0] or len(whole) < len(lines) - 1:
            raise ValueError(f"{path} is no file of a tuning: remove it, or give another folder")
        there = whole[0]["about"]
        for name in MUST_AGREE:
            if there.get(name) != self.about.get(name):
                told = f"{name} was {there.get(name)!r} and is {self.about.get(name)!r}"
                raise ValueError(f"{path}: {told}: remove it to measure anew, or give another folder")
        self.about = there
        self._known = dict(whole[1:])
        if len(whole) < len(lines):  # cut short in its last line
            path.write_text("\n".join(lines[: len(whole)]) + "\n", encoding="utf-8")


def mark(value: Any) -> str:
    """A short name of plain values, or of what a tensor holds: another model, prompt or size gives another."""
    if isinstance(value, torch.Tensor):
        return f"{float(value.detach().cpu().double().square().sum()):.12e}"
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
