"""What people type, as values: sizes such as 30x48x80 and options such as window=18x24x24."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

SIZES = re.compile(r"-?\d+(x-?\d+)*")


def sizes(name: str, text: str) -> tuple[int, ...]:
    """`"30x48x80"` as (30, 48, 80), outermost axis first; one number stands for a single axis.

    Raises:
        ValueError: anything else; the message names the option.
    """
    if not SIZES.fullmatch(text):
        raise ValueError(f"--{name} {text}: give whole numbers joined by x, outermost axis first, such as 30x48x80")
    return tuple(int(part) for part in text.split("x"))


def per_axis(name: str, text: str, axes: int) -> tuple[int, ...]:
    """Sizes for `axes` axes: one number is repeated.

    Raises:
        ValueError: another number of sizes than one or `axes`.
    """
    values = sizes(name, text)
    if len(values) == 1:
        values *= axes
    if len(values) != axes:
        raise ValueError(f"--{name} {text}: the grid has {axes} axes; give one number, or {axes} joined by x")
    return values


def options(pairs: Iterable[str]) -> dict[str, Any]:
    """`["window=18x24x24", "small_grid=error"]` as keyword options; what is not sizes is read as YAML.

    Raises:
        ValueError: a pair without `=`, or a name given twice.
    """
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not separator or not name.isidentifier():
            raise ValueError(f"--option {pair}: give NAME=VALUE, such as --option window=18x24x24")
        if name in found:
            raise ValueError(f"--option {name} is given twice")
        is_sizes = "x" in text and SIZES.fullmatch(text)
        found[name] = sizes(name, text) if is_sizes else yaml.safe_load(text)
    return found
