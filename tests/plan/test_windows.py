"""The tables of an axis against the rule written out pair by pair, and the properties in methods/gna.md."""

import random

import numpy as np
import pytest
import torch

from attn_plugins.ops.neighborhood.reference import axis_mask, neighborhood_mask
from attn_plugins.plan.windows import AxisWindow, axis_windows
from attn_plugins.sequence import Sequence
from tests.support.rule import axis_keys, axis_table, legal_axes, rule_mask

LONGEST = 16


@pytest.fixture(scope="module")
def settings():
    """Every legal axis of up to 16 tokens, as (options, AxisWindow)."""
    return [(options, AxisWindow(**options)) for options in legal_axes(LONGEST)]


def table_keys(axis, x):
    """The coordinates that `axis`' tables let coordinate `x` see."""
    residue, index = x % axis.dilation, x // axis.dilation
    start, end = axis.intervals(axis.class_length(residue))
    return [i * axis.dilation + residue for i in range(start[index], end[index])]


def test_tables_equal_the_rule_for_every_axis_up_to_16(settings):
    assert len(settings) == sum(m * (m + 1) for size in range(1, 17) for m in (size // d for d in range(1, size + 1)))
    for options, axis in settings:
        for x in range(axis.size):
            assert table_keys(axis, x) == axis_keys(x, **options), (options, x)


def test_what_some_queries_see_is_their_rows_of_the_rule():
    for options in legal_axes(10):
        queries = np.array([options["size"] - 1, 0, options["size"] // 2])
        seen = AxisWindow(**options).seen_from(queries)
        assert np.array_equal(seen, axis_table(**options).numpy()[queries]), options


def test_the_reference_mask_equals_the_rule_for_every_axis_up_to_10():
    for options in legal_axes(10):
        assert torch.equal(axis_mask(AxisWindow(**options)), axis_table(**options)), options


def test_not_causal_rows_have_exactly_the_window(settings):
    for options, axis in settings:
        if not axis.causal:
            assert {len(table_keys(axis, x)) for x in range(axis.size)} == {axis.window}, options


def test_every_query_sees_itself_and_intervals_never_go_back(settings):
    for options, axis in settings:
        for residue in range(axis.dilation):
            start, end = axis.intervals(axis.class_length(residue))
            index = np.arange(len(start))
            assert (start <= index).all() and (index < end).all(), options
            assert (np.diff(start) >= 0).all() and (np.diff(end) >= 0).all(), options


def test_causal_rows_see_nothing_ahead_and_at_most_the_window(settings):
    for options, axis in settings:
        if axis.causal:
            for x in range(axis.size):
                keys = table_keys(axis, x)
                assert keys[-1] == x and len(keys) <= axis.window, options


def test_a_window_of_the_whole_axis_is_full_for_any_stride():
    for size in range(1, LONGEST + 1):
        for stride in range(1, size + 1):
            axis = AxisWindow(size, -1, stride)
            assert axis.full and axis.window == size
            assert all(table_keys(axis, x) == list(range(size)) for x in range(size))


def test_full_says_what_the_tables_say(settings):
    for options, axis in settings:
        assert axis.full == bool(axis_table(**options).all()) or axis.size == 1, options


def test_the_mask_is_not_mirror_symmetric():
    table = axis_table(8, 4, 1, 1, False)
    assert not torch.equal(table, table.flip(0, 1))
    assert table_keys(AxisWindow(8, 4), 4) == [2, 3, 4, 5]  # an even window has one more key on the left


# The pattern table of methods/gna.md: each pattern written out by its own paper's words.


def test_stride_one_is_neighborhood_attention():
    for size in range(3, 14):
        for radius in range(1, (size - 1) // 2 + 1):
            axis = AxisWindow(size, 2 * radius + 1)
            for x in range(size):
                nearest = sorted(range(size), key=lambda y: (abs(y - min(max(x, radius), size - 1 - radius)), y))
                assert table_keys(axis, x) == sorted(nearest[: 2 * radius + 1])


def test_causal_stride_one_is_a_sliding_window():
    for size in range(1, 14):
        for window in range(1, size + 1):
            axis = AxisWindow(size, window, causal=True)
            assert all(table_keys(axis, x) == [y for y in range(size) if x - window < y <= x] for x in range(size))


def test_stride_of_the_window_is_swin_where_it_divides_the_axis():
    for block in range(1, 6):
        for size in range(block, 17):
            axis = AxisWindow(size, block, block)
            swin = [[y for y in range(size) if y // block == x // block] for x in range(size)]
            ours = [table_keys(axis, x) for x in range(size)]
            assert (ours == swin) == (size % block == 0)  # else the last block looks back
            assert ours[: size // block * block] == swin[: size // block * block]


def test_halo_in_the_interior():
    for block, halo in ((2, 1), (4, 2), (3, 1), (5, 2), (4, 3)):
        axis = AxisWindow(8 * block, block + 2 * halo, block)
        for x in range(2 * block, 6 * block):
            first = x // block * block
            assert table_keys(axis, x) == list(range(first - halo, first + block + halo))


def test_grid_attention_takes_every_dth_token():
    for count in (2, 3, 4):
        for dilation in (1, 2, 3, 5):
            axis = AxisWindow(count * dilation, count, count, dilation)
            for x in range(axis.size):
                assert table_keys(axis, x) == list(range(x % dilation, axis.size, dilation))


def test_sliding_tiles_borders_included():
    for tile in (1, 2, 3, 4):
        for tiles in (1, 3, 5):
            for count in range(tiles, 8):
                axis = AxisWindow(count * tile, tiles * tile, tile)
                for x in range(axis.size):
                    centre = min(max(x // tile, tiles // 2), count - 1 - tiles // 2)
                    seen = range((centre - tiles // 2) * tile, (centre + tiles // 2 + 1) * tile)
                    assert table_keys(axis, x) == list(seen)


@pytest.mark.parametrize("seed", range(30))
def test_more_axes_are_their_product(seed):
    dice = random.Random(seed)
    rows = []
    for _ in range(dice.randint(2, 3)):
        size = dice.randint(1, 8)
        dilation = dice.randint(1, min(3, size))
        window = dice.randint(1, size // dilation)
        rows.append((size, window, dice.randint(1, window), dilation, dice.random() < 0.3))
    grid, *setting = (tuple(column) for column in zip(*rows, strict=True))
    before, after = dice.randint(0, 3), dice.randint(0, 3)
    sequence = Sequence(grid, before, after, before // 2, after)
    mask = neighborhood_mask(sequence, axis_windows(grid, *setting))
    assert torch.equal(mask, rule_mask(grid, *setting, (before, before // 2), (after, after)))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"window": 9}, "window=9"),
        ({"window": 0}, "window=0"),
        ({"window": -2}, "window=-2"),
        ({"window": 4, "stride": 5}, "stride=5"),
        ({"window": 4, "stride": 0}, "stride=0"),
        ({"window": 4, "dilation": 3}, "dilation=3"),
        ({"window": 1, "dilation": 0}, "dilation=0"),
        ({"window": (3, 3, 3)}, "3 values"),
    ],
)
def test_what_is_illegal_is_named_with_its_grid(setting, named):
    with pytest.raises(ValueError, match=named) as error:
        axis_windows((8, 8), **setting)
    assert "(8, 8)" in str(error.value)
