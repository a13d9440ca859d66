"""The biases of trained agents (section 3.2): a coarse block for each head and agent, and a line for each axis.

    bias[head, agent, cell] = up(block)[cell] + sum over axes of line[cell's place on that axis]

Blocks and lines are enlarged linearly (`align_corners=False`), so weights of one resolution serve any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

LINEAR = ("linear", "bilinear", "trilinear")


def resized(t: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """A tensor (A, B, *sizes) of one to three sizes as (A, B, *grid), linearly between its cells' middles."""
    if t.shape[2:] == grid:
        return t
    return F.interpolate(t, size=grid, mode=LINEAR[len(grid) - 1], align_corners=False)


def cell_bias(block: torch.Tensor, lines: Sequence[torch.Tensor], grid: tuple[int, ...]) -> torch.Tensor:
    """What is added to the scores between agents and the cells of a grid, (1, H, n, prod(grid)).

    Args:
        block: (H, n, b, ...), one size per axis of the grid.
        lines: one per axis, (1, H, n, ...) with the axis' length at its place and 1 at the others.
        grid: cells per axis now; block and lines of other sizes are resized.
    """
    total = resized(block, grid)
    for axis, line in enumerate(lines):
        own = tuple(size if place == axis else 1 for place, size in enumerate(grid))
        total = total + resized(line[0], own)
    return total.flatten(2)[None]


def with_own_tokens(bias: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """The bias (1, H, n, cells) with columns before it, those of class tokens: own (1, H, n, tokens)."""
    return bias if own is None else torch.cat([own, bias], dim=-1)


def agents_resized(t: torch.Tensor, dim: int, before: tuple[int, ...], now: tuple[int, ...]) -> torch.Tensor:
    """Weights of agents that stand on a grid `before`, along `dim`, as weights of agents on a grid `now`."""
    if before == now:
        return t
    moved = t.movedim(dim, -1)
    rows = resized(moved.reshape(1, -1, *before), now)
    return rows.reshape(*moved.shape[:-1], -1).movedim(-1, dim).contiguous()
