"""GNA's rule for one axis, as tables.

Generalized Neighborhood Attention (arXiv 2504.16922, section 3) is separable: a query may see a key iff it may on
every axis. All of its semantics is therefore in a table per axis, made once on the host; whoever runs it (operator,
simulator, reference) reads intervals and knows nothing of strides, borders or dilation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class AxisWindow:
    """Window, stride, dilation and causality along one axis of `size` tokens. `window=-1` is the whole axis.

    Raises:
        ValueError: unless 1 <= stride <= window and window * dilation <= size. (A window of the whole axis at a
            dilation above 1 is size // dilation keys.)
    """

    size: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        if self.size < 1 or self.dilation < 1:
            raise ValueError(f"size={self.size}, dilation={self.dilation}: both must be at least 1")
        if self.window == -1:
            object.__setattr__(self, "window", self.size // self.dilation)
        if self.window < 1 or self.window * self.dilation > self.size:
            raise ValueError(
                f"window={self.window} x dilation={self.dilation} does not fit an axis of {self.size} tokens; "
                f"legal are windows of 1..{self.size // self.dilation} at this dilation, or -1 for the whole axis"
            )
        if not 1 <= self.stride <= self.window:
            raise ValueError(f"stride={self.stride}: legal is 1..{self.window}, the window")

    @property
    def full(self) -> bool:
        """Whether every query sees the whole axis."""
        return self.dilation == 1 and self.window == self.size and not self.causal

    def class_length(self, residue: int) -> int:
        """Tokens in the dilation class x mod dilation == residue; classes differ by at most one."""
        return -(-(self.size - residue) // self.dilation)

    @functools.cached_property
    def _intervals(self) -> dict[int, tuple[Ints, Ints]]:
        return {}

    def intervals(self, length: int) -> tuple[Ints, Ints]:
        """`start, end` of the keys that each index of a class of `length` tokens sees, in class units, end exclusive.

        Not causal: the window is centred on the middle of the query's stride group and shifted inward at the borders,
        never cut, so every row has exactly `window` keys. Causal: it ends at the query and begins `window` before the
        end of its stride group.
        """
        if length not in self._intervals:
            index = np.arange(length, dtype=np.int64)
            group = index // self.stride * self.stride
            if self.causal:
                start = np.maximum(np.minimum(group + self.stride, length) - self.window, 0)
                end = index + 1
            else:
                centre = group + self.stride // 2 - self.window // 2
                start = np.clip(centre, 0, length - self.window)
                end = start + self.window
            self._intervals[length] = (start, end)
        return self._intervals[length]

    def seen_from(self, queries: Ints) -> npt.NDArray[np.bool_]:
        """(queries, size): the coordinates of the axis that the queries at these coordinates see."""
        seen = np.zeros((len(queries), self.size), dtype=np.bool_)
        residue, index = queries % self.dilation, queries // self.dilation
        for one in range(self.dilation):
            length = self.class_length(one)
            start, end = (bound[index[residue == one], None] for bound in self.intervals(length))
            keys = np.arange(length)
            seen[residue == one, one :: self.dilation] = (keys >= start) & (keys < end)
        return seen


def axis_windows(
    grid: tuple[int, ...],
    window: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
) -> tuple[AxisWindow, ...]:
    """One `AxisWindow` per axis of `grid`; a single value serves every axis.

    Raises:
        ValueError: a tuple whose length is not the number of axes, or a setting that is illegal on its axis; the
            message names the axis, the value and what is legal.
    """
    columns = []
    for name, value in (("window", window), ("stride", stride), ("dilation", dilation), ("causal", causal)):
        column = tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(grid)
        if len(column) != len(grid):
            raise ValueError(f"{name}={value}: {len(column)} values for a grid of {len(grid)} axes {grid}")
        columns.append(column)
    axes = []
    for axis, (size, k, s, d, c) in enumerate(zip(grid, *columns, strict=True)):
        try:
            axes.append(AxisWindow(int(size), int(k), int(s), int(d), bool(c)))
        except ValueError as error:
            raise ValueError(f"axis {axis} of grid {grid}: {error}") from None
    return tuple(axes)
