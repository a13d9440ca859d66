"""Peak signal-to-noise ratio."""

from __future__ import annotations

import torch

from attn_plugins.metrics.frames import checked


def psnr(a: torch.Tensor, b: torch.Tensor, *, data_range: float = 1.0) -> torch.Tensor:
    """PSNR of each picture in decibels, infinite where two are equal.

    Args:
        a, b: (..., C, H, W) float, of one shape.
        data_range: span of legal values (1 for 0..1, 2 for -1..1).

    Returns:
        (...): one number per picture; of a video, one per frame.

    Raises:
        ValueError: shapes that differ, integer pictures, or a data range that is not above 0.
    """
    a, b = checked(a, b, data_range)
    error = (a - b).square().mean(dim=(-3, -2, -1))
    return 10 * torch.log10(data_range**2 / error)
