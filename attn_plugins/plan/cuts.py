"""Where to cut an axis into query tiles of different lengths.

At stride 1 the windows of an axis stand still near its borders and move in between, so tiles of one length mix queries
that see the same keys with others. The best cuts for a given price of a key come from dynamic programming.
"""

from __future__ import annotations

import functools

import numpy as np

from attn_plugins.plan.windows import AxisWindow, Ints

MASKED = 1.2  # a tile whose queries see different keys, against one whose queries see the same
FINE = 160  # longer axes are cut at multiples of a coarser step, and where their windows start or stop moving
PRICES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 256.0)


@functools.lru_cache(maxsize=1024)
def cut_axis(axis: AxisWindow, longest: int) -> tuple[tuple[int, ...], ...]:
    """Tile lengths along an undilated axis, no tile above `longest`: the distinct optima for a few prices of a key.

    A tile of n queries that see k keys between them costs k * (n + price), times MASKED on the n if they differ in
    what they see; the price stands for what the other axes and fetching a key add.
    """
    if axis.dilation > 1:
        return ()
    start, end = axis.intervals(axis.size)
    places = _places(start, end)
    return tuple(dict.fromkeys(_best(start, end, places, price, longest) for price in PRICES))


def _places(start: Ints, end: Ints) -> Ints:
    """Where a cut may be: everywhere, or on a coarse grid and at the ends of the runs of equal windows."""
    size = len(start)
    if size <= FINE:
        return np.arange(size + 1)
    moves = np.r_[False, (np.diff(start) != 0) | (np.diff(end) != 0), False]
    turns = np.flatnonzero(moves[1:] != moves[:-1])
    turns = np.r_[turns, turns + 1][: 4 * FINE]  # strides turn everywhere: the coarse grid serves them
    return np.unique(np.r_[0, np.arange(0, size, -(-size // FINE)), turns[turns < size], size])


def _best(start: Ints, end: Ints, places: Ints, price: float, longest: int) -> tuple[int, ...]:
    total = np.zeros(len(places))
    previous = np.zeros(len(places), dtype=np.int64)
    for j in range(1, len(places)):
        first, last = places[:j], places[j] - 1
        queries, keys = places[j] - first, end[last] - start[first]
        differ = (start[last] > start[first]) | (end[first] < end[last])
        cost = total[:j] + keys * (queries * np.where(differ, MASKED, 1.0) + price)
        cost = np.where((queries <= longest) | (first == places[j - 1]), cost, np.inf)
        previous[j] = int(np.argmin(cost))
        total[j] = cost[previous[j]]
    cuts = [len(places) - 1]
    while cuts[-1]:
        cuts.append(int(previous[cuts[-1]]))
    return tuple(int(n) for n in np.diff(places[cuts[::-1]]))
