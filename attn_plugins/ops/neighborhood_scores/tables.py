"""Who sees whom along one axis, as index tables for gathering (both directions, so that nothing is ever scattered).

Windows are separable, so a table per axis is all: a slot of an N-D window is one slot per axis.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from attn_plugins.plan.windows import AxisWindow, Ints


def _class_units(axis: AxisWindow) -> tuple[Ints, Ints, Ints]:
    """For each position: its dilation class, its index in it, and the first index of its window."""
    position = np.arange(axis.size, dtype=np.int64)
    residue, index = position % axis.dilation, position // axis.dilation
    start = np.empty_like(index)
    for r in range(axis.dilation):
        of_class = residue == r
        start[of_class] = axis.intervals(axis.class_length(r))[0]
    return residue, index, start


@functools.lru_cache(maxsize=512)
def keys_of_queries(axis: AxisWindow) -> Ints:
    """(window, size): the position of the key in each slot of each query's window."""
    residue, _, start = _class_units(axis)
    slot = np.arange(axis.window, dtype=np.int64)[:, None]
    return (start + slot) * axis.dilation + residue


@functools.lru_cache(maxsize=512)
def queries_of_keys(axis: AxisWindow) -> tuple[Ints, Ints, Ints]:
    """(queries, slots, seen), each (most, size): the queries that see each key and in which slot. A key near a border
    is seen more often than one inside, the outermost less: where it has fewer than `most`, `seen` is 0 and the rest
    repeats its first query, so that no key reads a token that it has nothing to do with."""
    keys = keys_of_queries(axis)
    slot, query = np.indices(keys.shape)
    order = np.lexsort((query.ravel(), keys.ravel()))
    key = keys.ravel()[order]
    count = np.bincount(key, minlength=axis.size)
    rank = np.arange(key.size) - np.repeat(np.cumsum(count) - count, count)
    shape = (int(count.max()), axis.size)
    first = order[np.cumsum(count) - count]
    queries, slots = (np.tile(table.ravel()[first], (shape[0], 1)) for table in (query, slot))
    seen = np.zeros(shape, dtype=np.int64)
    queries[rank, key] = query.ravel()[order]
    slots[rank, key] = slot.ravel()[order]
    seen[rank, key] = 1
    return queries, slots, seen


@functools.lru_cache(maxsize=512)
def relative_positions(axis: AxisWindow) -> Ints:
    """(window, size): `i_kv - i_q + window - 1` in class units, for each slot and query."""
    _, index, start = _class_units(axis)
    slot = np.arange(axis.window, dtype=np.int64)[:, None]
    return start + slot - index + axis.window - 1


def flat_index(columns: tuple[Ints, ...], sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """One index per axis, broadcast over the grid and combined in raster order of `sizes`: (N,)."""
    flat = torch.zeros((), dtype=torch.int64)
    for column, size in zip(columns, sizes, strict=True):
        flat = flat[..., None] * size + torch.from_numpy(column)
    return flat.flatten().to(device)
