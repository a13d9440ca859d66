"""Neighborhood attention by its definition: a dense boolean mask from the rule, and a softmax.

Short and plainly right; every faster form is compared with it. Nothing else builds an N x N mask.
"""

from __future__ import annotations

import torch

from attn_plugins.plan.windows import AxisWindow
from attn_plugins.sequence import Sequence


def axis_mask(axis: AxisWindow) -> torch.Tensor:
    """(size, size) bool: may the query at row x see the key at column y along this axis? The rule, key by key."""
    mask = torch.zeros(axis.size, axis.size, dtype=torch.bool)
    for query in range(axis.size):
        residue, index = query % axis.dilation, query // axis.dilation
        length = axis.class_length(residue)
        group = index // axis.stride * axis.stride
        if axis.causal:
            start = max(min(group + axis.stride, length) - axis.window, 0)
            end = index + 1
        else:
            start = min(max(group + axis.stride // 2 - axis.window // 2, 0), length - axis.window)
            end = start + axis.window
        mask[query, torch.arange(start, end) * axis.dilation + residue] = True
    return mask


def neighborhood_mask(sequence: Sequence, axes: tuple[AxisWindow, ...]) -> torch.Tensor:
    """(N, N) bool for one batch item: grid rows see their window and all real text, text rows see everything real.

    `sequence` has plain ints for its valid lengths (`Sequence.item`). Padding rows and columns are False.
    """
    grid = torch.ones(1, 1, dtype=torch.uint8)
    for axis in axes:
        grid = torch.kron(grid, axis_mask(axis).to(torch.uint8))
    first, last = sequence.text_before, sequence.text_before + sequence.tokens
    mask = torch.ones(sequence.length, sequence.length, dtype=torch.bool)
    mask[first:last, first:last] = grid.bool()
    assert isinstance(sequence.valid_before, int) and isinstance(sequence.valid_after, int)
    real = torch.ones(sequence.length, dtype=torch.bool)
    real[sequence.valid_before : first] = False
    real[last + sequence.valid_after :] = False
    return mask & real[:, None] & real[None, :]
