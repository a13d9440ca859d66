"""Tiles of a grid and what a query tile visits, each checked token by token."""

import itertools
import random

import numpy as np
import pytest

from attn_plugins.plan.partition import AxisTiles, Partition, axis_visits
from attn_plugins.plan.windows import AxisWindow
from tests.support.rule import axis_table, legal_axes


@pytest.mark.parametrize(
    ("size", "tile", "dilation"), [(1, 1, 1), (7, 3, 1), (8, 4, 2), (11, 2, 3), (5, 9, 1), (9, 2, 9)]
)
def test_axis_tiles_hold_each_token_once_and_stay_in_their_class(size, tile, dilation):
    tiles = AxisTiles(size, tile, dilation)
    coordinates, place = tiles.placed
    assert sorted(coordinates) == list(range(size))
    assert (np.diff(place) >= 0).all() and set(place) == set(range(tiles.count))
    for g in range(tiles.count):
        held = coordinates[place == g]
        assert set(held % dilation) == {tiles.residue[g]} and len(held) <= tile
        assert list(held // dilation) == list(range(tiles.lo[g], tiles.hi[g]))
    assert list(tiles.class_base) == [list(tiles.residue).index(r) for r in range(dilation)]


@pytest.mark.parametrize("seed", range(20))
def test_a_partition_is_boxes_in_tile_order(seed):
    dice = random.Random(seed)
    grid = [dice.randint(1, 7) for _ in range(dice.randint(1, 3))]
    axes = tuple(AxisTiles(size, dice.randint(1, size), dice.randint(1, min(3, size))) for size in grid)
    partition = Partition(axes, offset=dice.randint(0, 4))
    raster = {cell: i for i, cell in enumerate(itertools.product(*map(range, grid)))}
    axis_tile = [dict(zip(*axis.placed, strict=True)) for axis in axes]
    expected = sorted(raster, key=lambda cell: [t[x] for t, x in zip(axis_tile, cell, strict=True)])
    assert list(partition.order - partition.offset) == [raster[cell] for cell in expected]
    assert list(partition.starts) == [partition.offset + s for s in np.cumsum([0, *partition.sizes[:-1]])]
    at = partition.starts - partition.offset
    for number, (start, size, *tiles) in enumerate(zip(at, partition.sizes, *partition.unravel(), strict=True)):
        box = {tuple(t[x] for t, x in zip(axis_tile, cell, strict=True)) for cell in expected[start : start + size]}
        assert box == {tuple(tiles)}, number


def test_visits_equal_the_mask_for_every_axis_up_to_9():
    """The KV tiles a query tile visits are those with a pair in them; full ones have every pair."""
    for options in legal_axes(9):
        mask = axis_table(**options).numpy()
        axis = AxisWindow(**options)
        for q_tile, kv_tile in itertools.product((1, 2, 3, 4), (1, 2, 3)):
            visits = axis_visits(axis, q_tile, kv_tile)
            q_at, kv_at = (tiles.placed for tiles in (visits.q, visits.kv))
            for g in range(visits.q.count):
                rows = mask[q_at[0][q_at[1] == g]]
                blocks = [rows[:, kv_at[0][kv_at[1] == n]] for n in range(visits.kv.count)]
                seen = [n for n, block in enumerate(blocks) if block.any()]
                whole = [n for n, block in enumerate(blocks) if block.all()]
                assert list(range(visits.lo[g], visits.hi[g])) == seen, (options, q_tile, kv_tile, g)
                assert list(range(visits.full_lo[g], visits.full_hi[g])) == whole, (options, q_tile, kv_tile, g)
                assert visits.whole[g] == (seen == whole)


@pytest.mark.parametrize(
    ("window", "tile"), [(AxisWindow(13, 4, 2), 3), (AxisWindow(11, 3, 2, 3), 2), (AxisWindow(9, 5), 9)]
)
def test_masks_are_the_rows_of_the_rule(window, tile):
    mask = axis_table(window.size, window.window, window.stride, window.dilation, window.causal).numpy()
    visits = axis_visits(window, tile, 2)
    masks, which = visits.masks
    coordinates, place = visits.q.placed
    for g in range(visits.q.count):
        keys = np.arange(visits.key_lo[g], visits.key_hi[g]) * window.dilation + visits.q.residue[g]
        assert (masks[which[g]] == mask[np.ix_(coordinates[place == g], keys)]).all()
    assert len(masks) == len({(mask.shape, mask.tobytes()) for mask in masks})
