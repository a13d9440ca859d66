"""How tensors are handed to the kernels: strides in units, and biases in rows that can be read 16 bytes at a time."""

from __future__ import annotations

import math

import torch

from attn_plugins.ops.agent.triton.tiles import ROOM

WIDEST = 16  # more than a load takes in half precision; what divides a stride beyond it is of no use


def unit_of(*tensors: torch.Tensor | None) -> int:
    """What divides the strides of all axes but the last."""
    axes = ((t.shape[axis], t.stride(axis)) for t in tensors if t is not None for axis in range(t.dim() - 1))
    return math.gcd(WIDEST, *(step for size, step in axes if size > 1))


def strides(unit: int, *tensors: torch.Tensor | None) -> list[int]:
    """Of batch, head, token in units, 0 along axes of one, and of channel."""
    steps = []
    for t in tensors:
        if t is None:
            steps += [0, 0, 0, 0]
        else:
            steps += [t.stride(axis) // unit if t.shape[axis] > 1 else 0 for axis in range(3)]
            steps.append(t.stride(-1))
    return steps


def share_strides(unit: int, *tensors: torch.Tensor) -> list[int]:
    """(B, H, N, splits, D): as `strides`, and that of a share in units."""
    steps = []
    for t in tensors:
        steps += [*strides(unit, t), t.stride(3) // unit if t.shape[3] > 1 else 0]
    return steps


def spread(bias: torch.Tensor | None) -> list[int | None]:
    """Strides of a bias that `in_rows` gave: 0 along axes that it broadcasts over, None where those are the keys."""
    if bias is None:
        return [0, 0, 0, None]
    return [*(bias.stride(axis) if bias.shape[axis] > 1 else 0 for axis in range(3)), 1 if bias.shape[3] > 1 else None]


def room(keys: int) -> int:
    """How long the rows of a bias are for the kernels: the next multiple of 16."""
    return -(-keys // ROOM.value) * ROOM.value


def in_rows(bias: torch.Tensor | None) -> torch.Tensor | None:
    """A bias (1 or B, 1 or H, 1 or Nq, 1 or Nk) as the kernels read it: keys side by side, rows of `room`.

    Others are copied: 197 keys (or the 49 agents of the trained models) leave rows that begin anywhere, and an
    upsampled bias is transposed. The copy is of what the bias has of its own, which all items of a batch then read.
    """
    if bias is None:
        return None
    for axis in range(4):  # expanded: one stands for all
        if bias.stride(axis) == 0:
            bias = bias.narrow(axis, 0, 1)
    keys = bias.shape[3]
    if keys == 1:
        return bias
    apart = [bias.stride(axis) for axis in range(3) if bias.shape[axis] > 1]
    if bias.stride(3) == 1 and math.gcd(ROOM.value, keys, *apart) == ROOM.value and bias.data_ptr() % 16 == 0:
        return bias
    copy = bias.new_empty(*bias.shape[:3], room(keys))
    copy[..., :keys] = bias
    return copy
