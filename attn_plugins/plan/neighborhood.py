"""GNA's windows as a block plan."""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
import torch

from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.partition import AxisVisits, Partition, Tile, axis_visits
from attn_plugins.plan.rules import WindowRule
from attn_plugins.plan.windows import AxisWindow, Ints
from attn_plugins.sequence import Sequence


def neighborhood_plan(
    sequence: Sequence, axes: tuple[AxisWindow, ...], q_tile: tuple[Tile, ...], kv_tile: tuple[int, ...]
) -> BlockPlan:
    """The plan of generalized neighborhood attention over `sequence`, for tiles of the given shapes.

    Image rows see their window and all real text; text rows see everything real; padding rows belong to no block.
    Valid lengths must be plain ints (one batch item, or all alike).
    """
    assert isinstance(sequence.valid_before, int) and isinstance(sequence.valid_after, int)
    visits = tuple(axis_visits(a, q, kv) for a, q, kv in zip(axes, q_tile, kv_tile, strict=True))
    queries = Partition(tuple(v.q for v in visits), sequence.text_before)
    keys = Partition(tuple(v.kv for v in visits), sequence.text_before)
    text = [(0, sequence.valid_before), (sequence.text_before + sequence.tokens, sequence.valid_after)]
    text = [(start, size) for start, size in text if size]

    grid_blocks = len(keys.sizes)
    text_ids = np.arange(grid_blocks, grid_blocks + len(text))
    lists, full, tiles = _grid_lists(visits, queries, keys, text_ids)
    before = int(sequence.valid_before > 0)  # in raster order, so that a dense row need not gather
    everything = np.concatenate([text_ids[:before], np.arange(grid_blocks), text_ids[before:]])
    text_rows = [piece for start, size in text for piece in _pieces(start, size)]
    lists += [everything] * len(text_rows)
    full += [len(everything)] * len(text_rows)

    q_blocks = np.array([*zip(queries.starts, queries.sizes, strict=True), *text_rows], dtype=np.int64)
    kv_blocks = np.array([*zip(keys.starts, keys.sizes, strict=True), *text], dtype=np.int64)
    table = np.full((len(lists), max(len(row) for row in lists)), -1, dtype=np.int32)
    for i, row in enumerate(lists):
        table[i, : len(row)] = row
    count = torch.tensor([len(row) for row in lists], dtype=torch.int32)[None, None]
    whole = torch.tensor(full, dtype=torch.int32)[None, None]
    text_tokens = np.concatenate([np.arange(start, start + size) for start, size in text] or [np.zeros(0, np.int64)])
    rule = WindowRule(visits, tiles, sequence.text_before, torch.from_numpy(text_tokens))
    q_start, q_size, kv_start, kv_size = (
        torch.from_numpy(blocks[:, i].astype(np.int32)) for blocks in (q_blocks, kv_blocks) for i in (0, 1)
    )
    return BlockPlan(
        sequence.length,
        sequence.length,
        q_start,
        q_size,
        kv_start,
        kv_size,
        torch.from_numpy(table)[None, None],
        whole,
        count,
        rule=rule if bool((count != whole).any()) else None,
        q_order=_order(sequence, queries),
        kv_order=_order(sequence, keys),
    )


def _grid_lists(
    visits: tuple[AxisVisits, ...], queries: Partition, keys: Partition, text_ids: Ints
) -> tuple[list[npt.NDArray[np.integer]], list[int], tuple[Ints, ...]]:
    """Per query tile: text blocks, then KV tiles seen whole, then the others; how many are whole; tile of each axis."""
    tiles = queries.unravel()
    strides = [math.prod(keys.shape[i + 1 :]) for i in range(len(visits))]
    lists: list[npt.NDArray[np.integer]] = []
    full = []
    for row in range(len(queries.sizes)):
        block, whole = np.zeros(1, dtype=np.int64), np.ones(1, dtype=bool)
        for axis, tile, stride in zip(visits, tiles, strides, strict=True):
            g = tile[row]
            numbers = np.arange(axis.lo[g], axis.hi[g])
            inside = (numbers >= axis.full_lo[g]) & (numbers < axis.full_hi[g])
            block = np.add.outer(block, numbers * stride).reshape(-1)
            whole = np.logical_and.outer(whole, inside).reshape(-1)
        row_blocks = np.concatenate([text_ids, block[whole], block[~whole]])
        lists.append(row_blocks.astype(np.int32))  # millions of them at stride 1
        full.append(len(text_ids) + int(whole.sum()))
    return lists, full, tiles


def _pieces(start: int, size: int, longest: int = 1024) -> list[tuple[int, int]]:
    """Text rows in blocks of at most `longest`, so that no gathered chunk holds more queries than a tile would."""
    return [(at, min(longest, start + size - at)) for at in range(start, start + size, longest)]


def _order(sequence: Sequence, partition: Partition) -> torch.Tensor | None:
    """The partition's tile order over the whole sequence, text left where it is; None where it is raster order."""
    order = np.arange(sequence.length)
    order[sequence.text_before : sequence.text_before + sequence.tokens] = partition.order
    return None if bool((order == np.arange(len(order))).all()) else torch.from_numpy(order)


@functools.lru_cache(maxsize=32)
def cached_neighborhood_plan(
    sequence: Sequence, axes: tuple[AxisWindow, ...], q_tile: tuple[Tile, ...], kv_tile: tuple[int, ...]
) -> BlockPlan:
    """`neighborhood_plan`, made once for each (sequence, setting, tiles)."""
    return neighborhood_plan(sequence, axes, q_tile, kv_tile)
