"""Structural similarity (Wang et al., 2004): Gaussian window of 11 pixels, sigma 1.5, K = (0.01, 0.03)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attn_plugins.metrics.frames import checked

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def ssim(a: torch.Tensor, b: torch.Tensor, *, data_range: float = 1.0) -> torch.Tensor:
    """SSIM of each picture, 1 where two are equal; the mean over channels and over windows that lie inside.

    Args:
        a, b: (..., C, H, W) float, of one shape, at least 11 pixels high and wide.
        data_range: span of legal values (1 for 0..1, 2 for -1..1).

    Returns:
        (...): one number per picture; of a video, one per frame.

    Raises:
        ValueError: shapes that differ, pictures below 11 x 11, integer pictures, or a data range that is not above 0.
    """
    a, b = checked(a, b, data_range)
    height, width = a.shape[-2:]
    if min(height, width) < WINDOW:
        raise ValueError(f"pictures of {height} x {width}: SSIM's window needs at least {WINDOW} x {WINDOW} pixels")
    mean_a, mean_b, square_a, square_b, product = (_blurred(x) for x in (a, b, a * a, b * b, a * b))
    variance_a, variance_b = square_a - mean_a.square(), square_b - mean_b.square()
    covariance = product - mean_a * mean_b
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_a.square() + mean_b.square() + c1) * (variance_a + variance_b + c2))
    return similarity.mean(dim=(-2, -1)).reshape(a.shape[:-2]).mean(dim=-1)


def _blurred(pictures: torch.Tensor) -> torch.Tensor:
    """(..., H, W) -> (n, 1, H - 10, W - 10), by two one-dimensional convolutions without padding."""
    offset = torch.arange(WINDOW, dtype=pictures.dtype, device=pictures.device) - WINDOW // 2
    weights = torch.exp(-offset.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()
    flat = pictures.reshape(-1, 1, *pictures.shape[-2:])
    return F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
