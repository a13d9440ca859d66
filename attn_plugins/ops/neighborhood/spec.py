"""The setting of a neighborhood attention as a list of ints: what a custom op and a compiled graph can carry."""

from __future__ import annotations

import functools
from collections.abc import Sequence as Rows

import torch

from attn_plugins.ops.heads import equal_runs
from attn_plugins.ops.neighborhood.heads import HeadSetting
from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.cost import choose_tiles
from attn_plugins.plan.gpu_tiles import gpu_tiles
from attn_plugins.plan.neighborhood import cached_neighborhood_plan
from attn_plugins.plan.windows import axis_windows
from attn_plugins.sequence import Sequence


def encode(sequence: Sequence, setting: HeadSetting) -> list[int]:
    """[axes, grid.., window.., stride.., dilation.., causal.., text before, after, items, valid before.., after..]"""
    valid: list[int] = []
    items = sequence.batch or 1
    for lengths in (sequence.valid_before, sequence.valid_after):
        valid += list(lengths) if isinstance(lengths, tuple) else [lengths] * items  # type: ignore[list-item]
    columns = (sequence.grid, setting.window, setting.stride, setting.dilation, map(int, setting.causal))
    head = [len(sequence.grid), *(value for column in columns for value in column)]
    return [*head, sequence.text_before, sequence.text_after, items, *valid]


def plans_of(spec: Rows[int], q: torch.Tensor, backend: str) -> list[tuple[slice, BlockPlan]]:
    """The plans of an encoded setting: one for the whole batch, or one for each run of items with equal text lengths.

    Their tiles are those that the backend runs best.

    Raises:
        ValueError: a setting that is illegal on its grid.
    """
    return _plans_of(tuple(int(value) for value in spec), q.element_size(), backend)


@functools.lru_cache(maxsize=32)
def _plans_of(spec: tuple[int, ...], itemsize: int, backend: str) -> list[tuple[slice, BlockPlan]]:
    axes_count, rest = spec[0], spec[1:]
    columns = [rest[i * axes_count : (i + 1) * axes_count] for i in range(5)]
    grid, window, stride, dilation, causal = columns
    before, after, items, *valid = rest[5 * axes_count :]
    axes = axis_windows(grid, window, stride, dilation, tuple(bool(c) for c in causal))
    parts = []
    for where, lengths in equal_runs(list(zip(valid[:items], valid[items:], strict=True))):
        sequence = Sequence(grid, before, after, *lengths)
        tiles = gpu_tiles(axes) if backend == "triton" else choose_tiles(axes, sum(lengths), itemsize)
        parts.append((where, cached_neighborhood_plan(sequence, axes, tiles.q_tile, tiles.kv_tile)))
    return parts
