"""Attention by distance: how many hops away its weights lie, and how large a window would hold them.

A hop on a grid is a step to one of the neighbours, the diagonal ones too (Chebyshev distance), as in the k-hop profiles
of arXiv 2303.13731; here in one to three axes, and along each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def coordinates(tokens: torch.Tensor, grid: tuple[int, ...]) -> list[torch.Tensor]:
    """Of raster numbers (R,): one (R,) int64 per axis."""
    return list(torch.unravel_index(tokens, grid))


def axis_distances(tokens: torch.Tensor, grid: tuple[int, ...]) -> list[torch.Tensor]:
    """Per axis, (R, size) int64: how far each place on it is from each of the `tokens` (R,)."""
    places = coordinates(tokens, grid)
    return [(torch.arange(size) - at[:, None]).abs() for at, size in zip(places, grid, strict=True)]


def chebyshev(tokens: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """(R, N) int64: hops from each of the `tokens` to every token of the grid."""
    return over_grid(axis_distances(tokens, grid), torch.maximum)


def least_windows(tokens: torch.Tensor, grid: tuple[int, ...]) -> list[torch.Tensor]:
    """Per axis, (R, size) int64: the smallest neighborhood-attention window (stride 1, arXiv 2504.16922) that shows a
    query at each of the `tokens` each place on the axis.

    A window of w keys begins at x - w // 2, moved to lie within the axis of L keys. It grows by one key at a time, so
    every larger one holds the smaller: key y is in it from w = min(2 (x - y), L - y) on if it is before x, and from
    min(2 (y - x) + 1, y + 1) on if it is behind.
    """
    found = []
    for at, size in zip(coordinates(tokens, grid), grid, strict=True):
        y, x = torch.arange(size), at[:, None]
        before = torch.minimum(2 * (x - y), size - y)
        behind = torch.minimum(2 * (y - x) + 1, y + 1)
        found.append(torch.where(y < x, before, behind))
    return found


def over_grid(axes: list[torch.Tensor], join: Callable[..., torch.Tensor]) -> torch.Tensor:
    """(R, N) of one (R, size) per axis, joined in raster order by `join`: torch.maximum, torch.add."""
    found = axes[0]
    for axis in axes[1:]:
        found = join(found[:, :, None], axis[:, None]).flatten(1)
    return found


def mass_by(weights: torch.Tensor, numbers: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) float64: the sum of the weights (R, N) of each number 0..count-1 in `numbers` (R, N) int64."""
    mass = torch.zeros(count, dtype=torch.float64, device=weights.device)
    return mass.index_add_(0, numbers.to(weights.device).flatten(), weights.double().flatten())


def window_numbers(tokens: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """(R, N) int64: of the least window that shows a query at each of the `tokens` each token of the grid, the raster
    number in a table of `grid`'s shape, whose entry (i, j, ...) stands for windows of (i + 1, j + 1, ...) tokens."""
    strides = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
    steps = [(window - 1) * stride for window, stride in zip(least_windows(tokens, grid), strides, strict=True)]
    return over_grid(steps, torch.add)


def window_mass(weights: torch.Tensor, tokens: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """`grid`-shaped float64: the mass that only windows of at least (i + 1, j + 1, ...) tokens hold.

    Args:
        weights: (R, N), of the queries at `tokens` (R,), on the keys of the grid. `kept` sums it up.
    """
    return mass_by(weights, window_numbers(tokens, grid), math.prod(grid)).view(grid)


def kept(mass: torch.Tensor) -> torch.Tensor:
    """Of `window_mass`: entry (i, j, ...) is the mass that a window of (i + 1, j + 1, ...) tokens holds."""
    for axis in range(mass.ndim):
        mass = mass.cumsum(axis)
    return mass


def least_window(mass: torch.Tensor, least: float) -> tuple[int, ...] | None:
    """The window of fewest tokens that holds `least` of the mass of `window_mass`; None where none does.

    Of equally large ones, that which holds most.
    """
    held = kept(mass)
    sizes = over_grid([torch.arange(1, size + 1)[None] for size in mass.shape], torch.mul).view(mass.shape)
    enough = held >= least
    if not bool(enough.any()):
        return None
    smallest = sizes[enough].min()
    best = torch.where(enough & (sizes == smallest), held, -1.0).argmax()
    return tuple(int(place) + 1 for place in torch.unravel_index(best, mass.shape))
