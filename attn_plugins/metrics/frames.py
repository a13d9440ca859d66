"""What the picture metrics accept, checked in one place."""

from __future__ import annotations

import torch


def checked(a: torch.Tensor, b: torch.Tensor, data_range: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as float32 at least; bfloat16 pictures would lose the difference that is asked for.

    Raises:
        ValueError: shapes that differ, fewer than 3 axes, integer pictures, or a data range that is not above 0.
    """
    if a.shape != b.shape or a.ndim < 3:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}: give two equal shapes (..., C, H, W)")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(f"dtypes {a.dtype} and {b.dtype}: give float pictures (divide 8-bit ones by 255)")
    if not data_range > 0:
        raise ValueError(f"data_range={data_range}: give the span of legal values, 1 for pictures in 0..1")
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(wide), b.to(wide)
