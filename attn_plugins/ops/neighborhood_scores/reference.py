"""The two halves by their definition: all N x N scores, of which each query keeps those its mask allows."""

from __future__ import annotations

import torch

from attn_plugins.ops.neighborhood.reference import axis_mask
from attn_plugins.plan.windows import AxisWindow


def _window_keys(axes: tuple[AxisWindow, ...]) -> torch.Tensor:
    """(N, prod(window)): flat indices of the keys that each flat query sees, ascending."""
    mask = torch.ones(1, 1, dtype=torch.uint8)
    for axis in axes:
        mask = torch.kron(mask, axis_mask(axis).to(torch.uint8))
    return mask.nonzero()[:, 1].reshape(mask.shape[0], -1)


def scores(q: torch.Tensor, k: torch.Tensor, axes: tuple[AxisWindow, ...]) -> torch.Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    flat_q, flat_k = (t.flatten(2, -2).to(wide) for t in (q, k))
    index = _window_keys(axes).to(q.device)
    picked = (flat_q @ flat_k.transpose(-1, -2)).gather(-1, index.expand(*q.shape[:2], *index.shape))
    return picked.reshape(*q.shape[:-1], -1).to(q.dtype)


def aggregate(weights: torch.Tensor, v: torch.Tensor, axes: tuple[AxisWindow, ...]) -> torch.Tensor:
    wide = torch.promote_types(v.dtype, torch.float32)
    flat_w, flat_v = weights.flatten(2, -2).to(wide), v.flatten(2, -2).to(wide)
    index = _window_keys(axes).to(v.device).expand_as(flat_w)
    tokens = flat_v.shape[2]
    dense = flat_w.new_zeros(*flat_w.shape[:3], tokens).scatter_add(-1, index, flat_w)
    return (dense @ flat_v).reshape(v.shape).to(v.dtype)
