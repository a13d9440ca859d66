"""A GNA setting as a person writes it, fitted to the grid that a model really has.

People write windows for the resolution they know. Here they are spread over the axes, scaled from `base_size`, and
shrunk (or refused) where a grid is smaller than they thought; what comes out is legal for the operator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Value = int | float | str | bool | tuple[Any, ...]


@dataclass(frozen=True)
class Fitted:
    """Window, stride, dilation and causality, one per axis of the grid: what `neighborhood_attention` takes."""

    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]


@dataclass(frozen=True)
class Setting:
    """As written. `window`: tokens, -1 (the whole axis) or a share of the axis as a float in (0, 1];
    `stride`: tokens or "auto" (a quarter of the window). Each one value or one per axis.

    Raises:
        ValueError: a value that no grid could make legal, by name.
    """

    window: Value = 0.5
    stride: Value = "auto"
    dilation: Value = 1
    causal: Value = False

    def __post_init__(self) -> None:
        for window in _values(self.window):
            share = isinstance(window, float) and 0 < window <= 1
            if isinstance(window, bool) or not (share or (isinstance(window, int) and (window == -1 or window >= 1))):
                raise ValueError(f"window={window!r}: give 1 or more tokens, -1 (the whole axis) or a share in (0, 1]")
        for stride in _values(self.stride):
            if stride != "auto" and (isinstance(stride, bool) or not isinstance(stride, int) or stride < 1):
                raise ValueError(f'stride={stride!r}: give tokens (1 or more), or "auto"')
        for dilation in _values(self.dilation):
            if isinstance(dilation, bool) or not isinstance(dilation, int) or dilation < 1:
                raise ValueError(f"dilation={dilation!r}: give 1 or more")
        for window, stride in _pairs(self.window, self.stride):
            if isinstance(window, int) and isinstance(stride, int) and window != -1 and stride > window:
                raise ValueError(f"stride={stride} is larger than window={window}: legal strides are 1..{window}")

    def fit(self, grid: tuple[int, ...], base_size: tuple[int, ...] | None, small_grid: str) -> Fitted:
        """The setting on `grid`.

        With `base_size`, the grid it was written for, window, stride and dilation are scaled by actual / base, rounded
        and clamped (as the Cosmos-Predict2 models do), and a single frame of what was a video is dense.
        `small_grid="shrink"` makes what does not fit as large as the axis allows.

        Raises:
            ValueError: a number of values that is not the number of axes, or, under "error", what does not fit.
        """
        columns = [_spread(name, getattr(self, name), grid) for name in ("window", "stride", "dilation", "causal")]
        base = None if base_size is None else _spread("base_size", base_size, grid)
        if base is not None and len(grid) == 3 and grid[0] == 1 < base[0]:
            columns[0], columns[2] = (-1, -1, -1), (1, 1, 1)
        rows = [
            _fit_axis(axis, grid, window, stride, dilation, grid[axis] / base[axis] if base else 1.0, small_grid)
            for axis, (window, stride, dilation) in enumerate(zip(*columns[:3], strict=True))
        ]
        window, stride, dilation = zip(*rows, strict=True)
        return Fitted(window, stride, dilation, tuple(bool(causal) for causal in columns[3]))


def _fit_axis(
    axis: int, grid: tuple[int, ...], window: Any, stride: Any, dilation: int, ratio: float, small_grid: str
) -> tuple[int, int, int]:
    size = grid[axis]
    whole = window == -1
    if isinstance(window, float):
        window = max(1, round(window * size))
    elif ratio != 1.0 and not whole:
        window = min(max(round(window * ratio), min(2, size)), size)
        dilation = max(round(dilation * ratio), 1)
        dilation = min(dilation, max(size // window, 1))
    if ratio != 1.0 and stride != "auto":  # also beside a share of the axis, which scales by itself
        stride = max(round(stride * ratio), 1)
    if whole:
        window = max(size // dilation, 1)
    if window * dilation > size:
        if small_grid == "error":
            raise ValueError(
                f"window={window} x dilation={dilation} does not fit axis {axis} of grid {grid} ({size} tokens): make "
                'them smaller, give base_size to have them scaled, or small_grid="shrink"'
            )
        window = min(window, size)
        dilation = min(dilation, max(size // window, 1))
    stride = max(1, window // 4) if stride == "auto" else min(stride, window)
    return window, stride, dilation


def _spread(name: str, value: Any, grid: tuple[int, ...]) -> tuple[Any, ...]:
    """One value per axis. Fewer values than axes serve the last axes where those before have a size of 1."""
    row = value if isinstance(value, tuple) else (value,) * len(grid)
    missing = len(grid) - len(row)
    if missing > 0 and all(size == 1 for size in grid[:missing]):
        neutral = {"window": -1, "causal": False}.get(name, 1)
        row = (neutral,) * missing + row
    if len(row) != len(grid):
        raise ValueError(
            f"{name}={value}: {len(row)} values for the {len(grid)} axes of grid {grid}; give one, or one per axis"
        )
    return row


def _values(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _pairs(window: Any, stride: Any) -> list[tuple[Any, Any]]:
    windows, strides = _values(window), _values(stride)
    count = max(len(windows), len(strides))
    return list(
        zip(windows * (count if len(windows) == 1 else 1), strides * (count if len(strides) == 1 else 1), strict=False)
    )
