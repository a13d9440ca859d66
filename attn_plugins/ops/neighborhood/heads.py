"""Settings that differ by head: heads of one setting form a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HeadGroup:
    """The query heads of one setting, and the setting: one value per axis."""

    heads: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]


def group_heads(grid: tuple[int, ...], heads: int, *settings: Any) -> list[HeadGroup]:
    """Groups of heads with equal (window, stride, dilation, causal), in order of their first head.

    A setting is one value, a tuple (one per axis), or a list with one of either per query head.

    Raises:
        ValueError: a list whose length is not the number of heads, or a tuple that is not one per axis.
    """
    columns = []
    for name, value in zip(("window", "stride", "dilation", "causal"), settings, strict=True):
        rows = value if isinstance(value, list) else [value] * heads
        if len(rows) != heads:
            raise ValueError(f"{name}: a list of {len(rows)} settings for {heads} query heads; give one per head")
        columns.append([_per_axis(name, row, len(grid)) for row in rows])
    groups: dict[tuple[Any, ...], list[int]] = {}
    for head, setting in enumerate(zip(*columns, strict=True)):
        groups.setdefault(setting, []).append(head)
    return [HeadGroup(tuple(members), *setting) for setting, members in groups.items()]


def kv_heads_of(heads: tuple[int, ...], q_heads: int, kv_heads: int) -> list[int]:
    """The KV head of each query head in a group, or fewer where the group keeps whole groups of them."""
    size = q_heads // kv_heads
    wanted = [head // size for head in heads]
    distinct = list(dict.fromkeys(wanted))
    whole = len(heads) == len(distinct) * size and wanted == [kv for kv in distinct for _ in range(size)]
    return distinct if whole else wanted


def _per_axis(name: str, value: Any, axes: int) -> tuple[Any, ...]:
    row = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if len(row) != axes:
        raise ValueError(f"{name}={value}: {len(row)} values for a grid of {axes} axes; give one, or one per axis")
    return row
