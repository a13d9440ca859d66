"""Peak signal-to-noise ratio."""

from __future__ import annotations

import math

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


def latent_psnr(a: torch.Tensor, reference: torch.Tensor) -> float:
    """PSNR of latents in decibels, over the range of the reference, in float64; infinite where they are equal.

    Latents have no legal range: the peak is the largest of the reference less the smallest. A reference of one value
    has no range: then it is -inf for anything that is not equal.

    Raises:
        ValueError: shapes that differ.
    """
    if a.shape != reference.shape:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(reference.shape)}: latents of one shape are compared")
    x, y = (t.detach().to("cpu", torch.float64) for t in (a, reference))
    error = float((x - y).square().mean())
    if error == 0:
        return math.inf
    peak = float(y.max() - y.min())
    return 10 * math.log10(peak**2 / error) if peak else -math.inf


def bit_identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are of one dtype and shape and have the same bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in (a, b)))
