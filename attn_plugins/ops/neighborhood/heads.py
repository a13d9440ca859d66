"""Settings that differ by head."""

from __future__ import annotations

from typing import Any, NamedTuple


class HeadSetting(NamedTuple):
    """The setting of a query head: one value per axis."""

    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]


def head_settings(grid: tuple[int, ...], heads: int, *settings: Any) -> list[HeadSetting]:
    """One of each query head, from window, stride, dilation and causal.

    Each of them is one value, a tuple (one per axis), or a list with one of either per query head.

    Raises:
        ValueError: a list whose length is not the number of heads, or a tuple that is not one per axis.
    """
    columns = []
    for name, value in zip(HeadSetting._fields, settings, strict=True):
        rows = value if isinstance(value, list) else [value] * heads
        if len(rows) != heads:
            raise ValueError(f"{name}: a list of {len(rows)} settings for {heads} query heads; give one per head")
        columns.append([_per_axis(name, row, len(grid)) for row in rows])
    return [HeadSetting(*row) for row in zip(*columns, strict=True)]


def _per_axis(name: str, value: Any, axes: int) -> tuple[Any, ...]:
    row = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if len(row) != axes:
        raise ValueError(f"{name}={value}: {len(row)} values for a grid of {axes} axes; give one, or one per axis")
    return row
