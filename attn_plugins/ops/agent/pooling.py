"""Agents of a grid: how many along each axis, their means (adaptive average pooling), and where they stand.

Pool queries before their rotation and norm (section 3.2 pools plain ones): means of rotated vectors lose what turns
fast. Then norm the agents, and rotate them at `agent_centres`.
"""

from __future__ import annotations

import math

import torch

MANY_SLICES = 16


def agent_grid(grid: tuple[int, ...], agents: int) -> tuple[int, ...]:
    """Agents along each axis of a grid: of its aspect, about `agents` in all, never more than there are cells.

    Short axes are rounded first, so that the long ones make up for it.

    Raises:
        ValueError: an empty axis, or fewer than one agent.
    """
    _check_grid("grid", grid)
    if agents < 1:
        raise ValueError(f"agents={agents}: legal is 1 or more")
    found, left, cells = list(grid), float(agents), math.prod(grid)
    for done, axis in enumerate(sorted(range(len(grid)), key=lambda axis: grid[axis])):
        share = grid[axis] * (left / cells) ** (1 / (len(grid) - done))
        found[axis] = max(1, min(grid[axis], round(share)))
        left, cells = left / found[axis], cells // grid[axis]
    return tuple(found)


def pooled_grid(grid: tuple[int, ...], factors: tuple[int, ...]) -> tuple[int, ...]:
    """Cells along each axis after pooling `factors` cells into one; what is left over makes one more.

    Raises:
        ValueError: not one factor of 1 or more per axis.
    """
    _check_grid("grid", grid)
    if len(factors) != len(grid) or min(factors) < 1:
        raise ValueError(f"factors={factors} of grid={grid}: give one of 1 or more per axis")
    return tuple(-(-size // factor) for size, factor in zip(grid, factors, strict=True))


def pool_tokens(x: torch.Tensor, grid: tuple[int, ...], to: tuple[int, ...], before: int = 0) -> torch.Tensor:
    """Means over the cells of a grid: adaptive average pooling, as `torch.nn.AdaptiveAvgPool2d`, over 1 to 3 axes.

    Cell i of m along an axis of g is the mean over [floor(i g / m), ceil((i + 1) g / m)).

    Args:
        x: (..., N, C), such as (B, H, N, D); the grid's tokens, in raster order, begin at `before`. Text or class
            tokens before and after are left out.
        grid: cells per axis.
        to: cells per axis of the result.

    Returns:
        (..., prod(to), C).

    Raises:
        ValueError: a grid that x does not hold, or more cells in the result than in the grid.
    """
    _check_grid("grid", grid)
    _check_result(grid, to)
    cells = math.prod(grid)
    if before < 0 or before + cells > x.shape[-2]:
        raise ValueError(f"grid={grid} from token {before} on is {before + cells} tokens, x has {x.shape[-2]}")
    image = x[..., before : before + cells, :].unflatten(-2, grid)
    in_planes = min(len(grid), 2) if x.device.type == "cpu" and grid[-2:] != to[-2:] else 0
    for axis, (many, few) in enumerate(zip(grid, to, strict=True), start=-len(grid) - 1):
        if many != few and axis < -in_planes - 1:
            image = _pool_axis(image, axis, few)
    if in_planes:
        image = _pool_planes(image, to)
    return image.flatten(-len(grid) - 1, -2).to(x.dtype)


def agent_centres(grid: tuple[int, ...], to: tuple[int, ...], device: torch.device | None = None) -> torch.Tensor:
    """Where the pooled cells stand, (prod(to), axes) float32: per axis the mean position of what a cell averages.

    Raises:
        ValueError: as `pool_tokens`.
    """
    _check_grid("grid", grid)
    _check_result(grid, to)
    axes = []
    for many, few in zip(grid, to, strict=True):
        axes.append(_means(many, few, device) @ torch.arange(many, dtype=torch.float64, device=device))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2).float()


def _pool_axis(image: torch.Tensor, axis: int, few: int) -> torch.Tensor:
    """One axis of (..., C), counted from the end, in at least float32."""
    wide, many = torch.promote_types(image.dtype, torch.float32), image.shape[axis]
    if many % few == 0:
        return _mean(image.unflatten(axis, (few, -1)), axis, wide)
    means = _means(many, few, image.device).to(wide)
    return torch.einsum("fm,...mc->...fc", means, image.to(wide).movedim(axis, -2)).movedim(-2, axis)


def _pool_planes(image: torch.Tensor, to: tuple[int, ...]) -> torch.Tensor:
    """The last axes, one or two, of (..., C) on a CPU: PyTorch's pooling of channels that lie innermost.

    One pass, which accumulates in float32: three to ten times as fast as sums of slices. Only on a CPU: its gradient
    on CUDA adds by atomics, in no fixed order.
    """
    if len(to) == 1:
        return _pool_planes(image.unsqueeze(-3), (1, *to)).squeeze(-3)
    channels, height, width = image.shape[-1], *to[-2:]
    # Tokens that hold their heads side by side: those are channels too.
    beside = (axis for axis in range(-image.dim(), -3) if image.stride(axis) == channels < image.stride(-2))
    heads = next(beside, None)
    if heads is not None:
        image = image.movedim(heads, -2).flatten(-2)
    planes = image.reshape(-1, *image.shape[-3:]).permute(0, 3, 1, 2)
    if planes.shape[2] % height == 0 and planes.shape[3] % width == 0:
        found = torch.nn.functional.avg_pool2d(planes, (planes.shape[2] // height, planes.shape[3] // width))
    else:
        found = torch.nn.functional.adaptive_avg_pool2d(planes, (height, width))
    found = found.permute(0, 2, 3, 1).reshape(*image.shape[:-3], height, width, image.shape[-1])
    return found if heads is None else found.unflatten(-1, (-1, channels)).movedim(-2, heads)


def _mean(t: torch.Tensor, axis: int, dtype: torch.dtype) -> torch.Tensor:
    """Of a few slices by adding them: on a CPU a reduction over an inner axis takes many times as long."""
    count = t.shape[axis]
    if count > MANY_SLICES:
        return t.mean(axis, dtype=dtype)
    first, *others = t.unbind(axis)
    return sum(others, start=first.to(dtype)) / count


def _means(many: int, few: int, device: torch.device | None) -> torch.Tensor:
    """(few, many) float64: row i averages its window."""
    row = torch.arange(few, device=device)[:, None]
    column = torch.arange(many, device=device)
    inside = (column >= row * many // few) & (column < -((row + 1) * many // -few))
    return inside / inside.sum(1, keepdim=True, dtype=torch.float64)


def _check_grid(name: str, grid: tuple[int, ...]) -> None:
    if not 1 <= len(grid) <= 3 or min(grid) < 1:
        raise ValueError(f"{name}={grid}: legal are 1 to 3 axes of 1 or more cells")


def _check_result(grid: tuple[int, ...], to: tuple[int, ...]) -> None:
    if len(to) != len(grid) or any(not 1 <= few <= many for few, many in zip(to, grid, strict=True)):
        raise ValueError(f"to={to}: legal is one size per axis of grid={grid}, from 1 to the grid's")
