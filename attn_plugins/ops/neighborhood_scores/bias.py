"""A table of one value per head and relative position, read for every query and slot of its window.

The gradient is a product with one-hot matrices, an axis at a time: the same sum as a scatter, in a fixed order.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from attn_plugins.ops.neighborhood_scores.tables import relative_positions
from attn_plugins.plan.windows import AxisWindow, axis_windows


def read_bias(bias: torch.Tensor, axes: tuple[AxisWindow, ...]) -> torch.Tensor:
    """bias (H, 2 * window_0 - 1, ...) -> (H, *grid, prod(window)), at stride 1. Differentiable any number of times."""
    return _read(bias, [a.size for a in axes], [a.window for a in axes], [a.dilation for a in axes])


@torch.library.custom_op("attn_plugins::neighborhood_bias", mutates_args=())
def _read(bias: torch.Tensor, grid: list[int], window: list[int], dilation: list[int]) -> torch.Tensor:
    rank = len(grid)
    flat = torch.zeros((), dtype=torch.int64)
    for place, axis in enumerate(axis_windows(tuple(grid), tuple(window), 1, tuple(dilation))):
        shape = [1] * (2 * rank)
        shape[place], shape[rank + place] = axis.size, axis.window
        flat = flat * (2 * axis.window - 1) + torch.from_numpy(relative_positions(axis).T.copy()).reshape(shape)
    picked = bias.flatten(1).index_select(1, flat.flatten().to(bias.device))
    return picked.reshape(bias.shape[0], *grid, math.prod(window))


@torch.library.custom_op("attn_plugins::neighborhood_bias_gradient", mutates_args=())
def _gradient(grad: torch.Tensor, grid: list[int], window: list[int], dilation: list[int]) -> torch.Tensor:
    rank = len(grid)
    total = grad.reshape(grad.shape[0], *grid, *window).to(torch.promote_types(grad.dtype, torch.float32))
    for place, axis in enumerate(axis_windows(tuple(grid), tuple(window), 1, tuple(dilation))):
        relative = relative_positions(axis).T.reshape(-1)
        one_hot = torch.from_numpy(np.eye(2 * axis.window - 1)[relative]).to(total)
        # the axes not yet summed keep their order: remaining sizes, remaining windows, finished tables
        total = total.movedim((1, 1 + rank - place), (-2, -1)).flatten(-2) @ one_hot
    return total.to(grad.dtype)


@_read.register_fake
def _(bias, grid, window, dilation):  # type: ignore[no-untyped-def]
    return bias.new_empty(bias.shape[0], *grid, math.prod(window))


@_gradient.register_fake
def _(grad, grid, window, dilation):  # type: ignore[no-untyped-def]
    return grad.new_empty(grad.shape[0], *(2 * size - 1 for size in window))


def _remember(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.setting = inputs[1:]


_read.register_autograd(lambda ctx, g: (_gradient(g, *ctx.setting), None, None, None), setup_context=_remember)
_gradient.register_autograd(lambda ctx, g: (_read(g, *ctx.setting), None, None, None), setup_context=_remember)
