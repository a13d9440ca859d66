"""Row intervals on up to three axes as four integers: how a kernel asks whether a query sees a key.

A key has a position per axis, a query an interval `[low, high]` of them. Positions of all axes are packed as fields of
one integer, each with a guard bit above it: one subtraction then compares all axes at once, and a field's guard stays
set where its difference is not negative. So a pair costs two subtractions and one test, whatever the number of axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from attn_plugins.plan.rules import WindowRule
from attn_plugins.plan.windows import AxisWindow

if TYPE_CHECKING:
    from attn_plugins.plan.block_plan import BlockPlan

MOST_BITS = 31  # the sign stays out of it


@dataclass(frozen=True, eq=False)
class Intervals:
    """Query at place i sees key at place j iff `(k[0, j] - q[0, i]) & (q[1, i] - k[1, j]) & guards == guards`.

    Attributes:
        q: (2, N) int32: the packed lows; the packed highs (the last position seen), guards set.
        k: (2, N_kv) int32: the packed positions, guards set; the packed positions.
        guards: the guard bits.
    """

    q: torch.Tensor
    k: torch.Tensor
    guards: int

    def to_mask(self) -> torch.Tensor:
        """(N, N_kv) bool, for tests."""
        above = self.k[0] - self.q[0][:, None]
        below = self.q[1][:, None] - self.k[1]
        return (above & below & self.guards) == self.guards


def pack(
    positions: list[torch.Tensor],
    low: list[torch.Tensor],
    high: list[torch.Tensor],
    sizes: list[int],
    q_all: torch.Tensor | None = None,
    k_all: torch.Tensor | None = None,
) -> Intervals:
    """Intervals from, per axis, key positions (N_kv,) and the first and last position that each query (N,) sees.

    Positions lie in `0..sizes[axis] - 1`, `low` and `high` in `0..sizes[axis]`: what is below 0 borrows from the next
    axis. A query whose `high` is below its `low` sees nothing. `q_all`, `k_all`: (N,) and (N_kv,) bool, queries that
    see everything and keys that all see.

    Raises:
        ValueError: axes too long for one integer (more than some 30 million tokens).
    """
    widths = [max(int(size).bit_length(), 1) for size in sizes]
    if sum(widths) + len(widths) > MOST_BITS:
        raise ValueError(f"axes of {sizes} positions do not fit {MOST_BITS} bits: no kernel takes a grid of that size")
    device = positions[0].device
    columns = [torch.zeros(len(t), dtype=torch.int64, device=device) for t in (low[0], low[0], positions[0])]
    guards = fields = shift = 0
    for width, axis in zip(widths, zip(low, high, positions, strict=True), strict=True):
        for column, values in zip(columns, axis, strict=True):
            column += values.long() << shift
        guards |= 1 << (shift + width)
        fields |= ((1 << width) - 1) << shift
        shift += width + 1
    q_low, q_high, place = columns
    k_above, k_below = place | guards, place
    q_high = q_high | guards
    if q_all is not None:
        q_low, q_high = q_low.masked_fill(q_all, 0), q_high.masked_fill(q_all, guards | fields)
    if k_all is not None:
        k_above, k_below = k_above.masked_fill(k_all, guards | fields), k_below.masked_fill(k_all, 0)
    return Intervals(torch.stack([q_low, q_high]).int(), torch.stack([k_above, k_below]).int(), guards)


def window_intervals(rule: WindowRule, plan: BlockPlan) -> Intervals:
    """GNA's windows, by place in the plan's orders; text sees everything and is seen by all.

    A key's position along an axis is its place in the order of residue classes: there a dilated window is one interval.
    """
    windows = [axis.window for axis in rule.axes]
    tables = [torch.from_numpy(_axis_tables(window)) for window in windows]
    sizes = [window.size for window in windows]
    q, kv = (_coordinates(order, length, rule.grid_start, sizes)
             for order, length in ((plan.q_order, plan.q_length), (plan.kv_order, plan.kv_length)))  # fmt: skip
    return pack(
        [table[0][at] for table, at in zip(tables, kv[0], strict=True)],
        [table[1][at] for table, at in zip(tables, q[0], strict=True)],
        [table[2][at] for table, at in zip(tables, q[0], strict=True)],
        sizes,
        q[1],
        kv[1],
    )


def _axis_tables(window: AxisWindow) -> np.ndarray:
    """(3, size): by coordinate, the position of the key, and the first and last position that the query sees."""
    tables = np.zeros((3, window.size), dtype=np.int64)
    base = 0
    for residue in range(window.dilation):
        length = window.class_length(residue)
        start, end = window.intervals(length)
        tables[:, residue :: window.dilation] = base + np.stack([np.arange(length), start, end - 1])
        base += length
    return tables


def _coordinates(
    order: torch.Tensor | None, length: int, grid_start: int, sizes: list[int]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Per axis the coordinate of the token at each place (0 for text), and which places hold text."""
    token = (torch.arange(length) if order is None else order) - grid_start
    tokens = int(np.prod(sizes))
    text = (token < 0) | (token >= tokens)
    token = token.masked_fill(text, 0)
    coordinates = []
    for size in reversed(sizes):
        coordinates.append(token % size)
        token = token // size
    return coordinates[::-1], text
