"""NATTEN, where it is installed: the same neighborhood attention by its own kernels."""

from __future__ import annotations

import torch

from attn_plugins.pipelines.benching.sides import Built


def build(grid: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...]) -> Built:
    """Takes (B, *grid, H, D), which is how our inputs lie in memory: views, no copy, on the way in and out.

    Raises:
        ImportError: it is not installed.
    """
    import natten

    attend = getattr(natten, f"na{len(grid)}d")

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tensors = (t.transpose(1, 2).unflatten(1, grid) for t in (q, k, v))
        return attend(*tensors, kernel_size=window, stride=stride).flatten(1, len(grid)).transpose(1, 2)

    return Built(run)
