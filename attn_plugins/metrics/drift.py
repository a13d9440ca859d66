"""How far a tensor has moved from the dense run's: latents per step, or one attention's output."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Drift:
    """`relative_l2`: |a - b| / |b|, 0 where equal. `cosine`: of the flattened tensors, 1 where parallel."""

    relative_l2: float
    cosine: float


def drift(a: torch.Tensor, b: torch.Tensor) -> Drift:
    """Drift of `a` from the reference `b`, over all of their elements, computed in float64.

    Where the reference is all zero, relative_l2 is 0 for an equal tensor and infinite for any other, and cosine is nan.

    Raises:
        ValueError: shapes that differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}: a drift is between tensors of one shape")
    x, y = (t.detach().to("cpu", torch.float64).flatten() for t in (a, b))
    norm_x, norm_y, norm_difference = (float(torch.linalg.vector_norm(t)) for t in (x, y, x - y))
    relative = norm_difference / norm_y if norm_y else (float("inf") if norm_difference else 0.0)
    cosine = float(x @ y) / (norm_x * norm_y) if norm_x and norm_y else float("nan")
    return Drift(relative, cosine)
