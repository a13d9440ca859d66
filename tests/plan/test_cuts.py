"""Cuts of an axis are cheapest for the price they were made for, legal, and lie where the windows stand still."""

import itertools
import random

import pytest

from attn_plugins.plan import cuts
from attn_plugins.plan.cuts import MASKED, PRICES, cut_axis
from attn_plugins.plan.partition import AxisTiles, axis_visits
from attn_plugins.plan.windows import AxisWindow


def price_of(axis, tiles, price):
    start, end = axis.intervals(axis.size)
    total, first = 0.0, 0
    for queries in tiles:
        last = first + queries - 1
        differ = start[first] != start[last] or end[first] != end[last]
        total += (end[last] - start[first]) * (queries * (MASKED if differ else 1) + price)
        first += queries
    return total


def compositions(n):
    for bits in itertools.product((0, 1), repeat=n - 1):
        tiles, run = [], 1
        for bit in bits:
            if bit:
                tiles, run = [*tiles, run], 1
            else:
                run += 1
        yield (*tiles, run)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cuts_are_cheaper(seed):
    dice = random.Random(seed)
    size = dice.randint(1, 10)
    window = dice.randint(1, size)
    axis = AxisWindow(size, window, dice.randint(1, window), causal=dice.random() < 0.3)
    longest = dice.choice([size, max(1, size // 2)])
    found = cut_axis(axis, longest)
    for price in PRICES:
        best = min(price_of(axis, t, price) for t in compositions(size) if max(t) <= longest)
        assert min(price_of(axis, t, price) for t in found) == pytest.approx(best)
    assert all(sum(t) == size and max(t) <= longest for t in found)


def test_long_axes_are_cut_where_windows_turn():
    """The windows of 30,000 tokens stand still for the first and the last 2,048: these cuts are among the places."""
    axis = AxisWindow(30_000, 4096)
    places = cuts._places(*axis.intervals(axis.size)).tolist()
    assert {2049, 30_000 - 2047} <= set(places) and len(places) <= 5 * cuts.FINE


def test_dilated_axes_are_not_cut_unevenly():
    assert cut_axis(AxisWindow(12, 4, dilation=2), 12) == ()
    with pytest.raises(ValueError, match="undilated"):
        AxisTiles(12, (6, 6), 2)
    with pytest.raises(ValueError, match="add up"):
        AxisTiles(12, (6, 5))


def test_visits_of_uneven_tiles():
    visits = axis_visits(AxisWindow(16, 8), (5, 7, 4), 1)
    assert visits.key_lo.tolist() == [0, 1, 8] and visits.key_hi.tolist() == [8, 15, 16]
    assert visits.whole.tolist() == [True, False, True]
