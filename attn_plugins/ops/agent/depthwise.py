"""The depthwise convolution of the values (section 3.3): what few agents blur, it brings back."""

from __future__ import annotations

import math

import torch

from attn_plugins.ops.agent.inputs import check_image

CONVOLUTIONS = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)


def depthwise(
    values: torch.Tensor, grid: tuple[int, ...], weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Convolve each channel of the values, which stand as an image of `grid`, zeros around it.

    Args:
        values: (B, H_kv, prod(grid), D).
        weight: (H * D, 1, s, ...), one odd s per axis; H is a multiple of H_kv.
        bias: (H * D,).

    Returns:
        (B, H, prod(grid), D).
    """
    batch, kv_heads, cells, dim = values.shape
    channels = weight.shape[0]
    values = values.repeat_interleave(channels // (kv_heads * dim), dim=1)
    image = values.transpose(-1, -2).reshape(batch, channels, *grid)
    padding = tuple(s // 2 for s in weight.shape[2:])
    found = CONVOLUTIONS[len(grid) - 1](image, weight, bias, padding=padding, groups=channels)
    return found.reshape(batch, channels // dim, dim, cells).transpose(-1, -2)


def image_rows(
    q: torch.Tensor,
    v: torch.Tensor,
    grid: tuple[int, ...] | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    exact_before: int,
    exact_after: int,
) -> slice | None:
    """The rows that the convolution reads and adds to; None without one.

    Raises:
        ValueError: as `agent_attention` says.
    """
    if weight is None:
        if bias is not None:
            raise ValueError("dwc_bias is of a convolution: give dwc_weight too")
        return None
    stop = q.shape[2] - exact_after
    cells = math.prod(grid or (0,))
    check_image(q, v, grid, weight, bias, cells, stop - exact_before)
    return slice(stop - cells, stop)
