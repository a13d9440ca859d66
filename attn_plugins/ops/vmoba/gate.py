"""The gate (arXiv 2506.23858): the mean of a block's keys times a query, unscaled, in at least float32."""

from __future__ import annotations

import itertools

import torch

from attn_plugins.plan.partition import AxisTiles, Partition


def pool(t: torch.Tensor, partition: Partition) -> torch.Tensor:
    """Means over the boxes of a partition, by true lengths: (B, H, N, D) to (B, H, boxes, D), at least float32."""
    tokens = 1
    for axis in partition.axes:
        tokens *= axis.size
    grid = t.narrow(2, partition.offset, tokens).unflatten(2, [axis.size for axis in partition.axes])
    for number, axis in reversed(list(enumerate(partition.axes))):
        grid = _sum_axis(grid, 2 + number, axis)
    sums = grid.flatten(2, 1 + len(partition.axes))
    sizes = torch.from_numpy(partition.sizes).to(sums.dtype)
    return sums / _moved(sizes, t.device)[:, None]


def gate_scores(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(B, H, R, C): rows (B, H, R, D) against pooled keys (B, H_kv, C, D), both at least float32.

    One product per item and head: what a batch mate has in it then plays no part, not even in the order of a sum.
    """
    group = rows.shape[1] // keys.shape[1]
    scores = rows.new_empty(*rows.shape[:3], keys.shape[2])
    if rows.device.type != "cpu":
        return torch.matmul(rows, keys.repeat_interleave(group, dim=1).transpose(-1, -2), out=scores)
    for b, h in itertools.product(range(rows.shape[0]), range(rows.shape[1])):
        torch.mm(rows[b, h], keys[b, h // group].t(), out=scores[b, h])
    return scores


def _sum_axis(t: torch.Tensor, dim: int, axis: AxisTiles) -> torch.Tensor:
    """Sums over the tiles of one axis."""
    wide = torch.promote_types(t.dtype, torch.float32)
    if isinstance(axis.tile, int) and axis.size % axis.tile == 0:
        if axis.tile == 1:
            return t.to(wide)
        return t.unflatten(dim, (-1, axis.tile)).sum(dim + 1, dtype=wide)
    low, length = torch.from_numpy(axis.lo), torch.from_numpy(axis.hi - axis.lo)
    inside = torch.arange(int(length.max()))
    index = _moved((low[:, None] + inside).clamp(max=axis.size - 1).flatten(), t.device)
    beyond = _moved(inside >= length[:, None], t.device)
    tiles = t.index_select(dim, index).unflatten(dim, tuple(beyond.shape))
    return tiles.masked_fill(beyond[(..., *(None,) * (t.dim() - 1 - dim))], 0).sum(dim + 1, dtype=wide)


def _moved(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device without waiting for it."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)
