"""When a CPU should gather, and in how many chunks: a cost model of ATen's flash kernel, not autotuning.

Costs are in (query, key) pairs of one large dense call. The constants were measured on an AMD EPYC without AMX, at head
size 64, in float32 and bfloat16; those of float64, and of a key that is packed for AMX, were taken over or set by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attn_plugins.ops.spans.cost import KEY_SPLIT
from attn_plugins.ops.spans.cost import READ as PACKED
from attn_plugins.plan.cost import SLICES

PAIR = {256: 1.0, 64: 1.1, 32: 1.3}  # of a pair, by the rows that the kernel takes at a time
# By bytes an element:
MASK = {2: 0.12, 4: 0.17, 8: 0.1}  # of a pair under a mask, besides
MADE = {2: 0.04, 4: 0.06, 8: 0.1}  # of an entry of a mask
READ = {2: 17.0, 4: 12.0, 8: 12.0}  # of a key of a problem
FETCH = 55.0  # of a row: gathered, scaled and put back
MERGE = 30.0  # of a row of two parts
CALL = 60_000.0  # of a call, and of what has to be done for it
MASKED_KEYS = 1024  # before the diagonal: up to here they may go along under the mask
# Gathering must promise this much: what it costs besides is less well known.
SURE, SURE_CAUSAL = 0.97, 0.84


@dataclass(frozen=True)
class Place:
    """Where an item's rows [start, stop) of q stand: keys [first, end) are real, `offset` is the key of row 0."""

    start: int
    stop: int
    first: int
    end: int
    offset: int
    causal: bool


@dataclass(frozen=True)
class Chunk:
    """`rows` of each of some heads, together: the keys [first, low) are seen by all of them, [low, high) by some."""

    rows: int
    low: int
    high: int


def dense_cost(place: Place, problems: int, itemsize: int, threads: int) -> float:
    """Of all rows of so many query heads."""
    rows, before = place.stop - place.start, place.offset + place.start - place.first
    pairs = place.end - place.first
    if place.causal and rows:
        height = _height(rows)
        ends = [min(-(-(row + height) // KEY_SPLIT) * KEY_SPLIT, rows) for row in range(0, rows, height)]
        pairs = before + sum(ends) // len(ends)
    work = _longest(rows, problems, threads) * pairs * PAIR[_height(rows)]
    return work + problems * (place.end - place.first) * read_cost(itemsize)


def gather_cost(chunks: Sequence[Chunk], place: Place, problems: int, itemsize: int, threads: int) -> float:
    """Of the chunks of so many KV heads together."""
    cost = 0.0
    for chunk in chunks:
        work = _longest(chunk.rows, problems, threads) * PAIR[_height(chunk.rows)]
        rows = problems * chunk.rows
        cost += work * (chunk.high - place.first) + rows * FETCH + CALL
        cost += problems * (chunk.high - place.first) * read_cost(itemsize)
        if place.causal:
            cost += rows * (chunk.high - chunk.low) * (MASK[itemsize] + MADE[itemsize])
            cost += min(_together(chunk, place, problems, itemsize), _apart(chunk, problems))
    return cost


def joined(chunk: Chunk, place: Place, problems: int, itemsize: int) -> bool:
    """Whether the keys before the diagonal go under its mask: one call, and nothing to merge."""
    return _together(chunk, place, problems, itemsize) <= _apart(chunk, problems)


def read_cost(itemsize: int) -> float:
    """Of a key of a problem."""
    packs = itemsize == 2 and getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return PACKED[itemsize] if packs else READ[itemsize]


def _together(chunk: Chunk, place: Place, problems: int, itemsize: int) -> float:
    before = chunk.low - place.first
    if before > MASKED_KEYS:
        return float("inf")
    return problems * chunk.rows * before * (MASK[itemsize] + MADE[itemsize])


def _apart(chunk: Chunk, problems: int) -> float:
    return problems * chunk.rows * MERGE + CALL


def _height(rows: int) -> int:
    return next(height for least, height in SLICES if rows >= least)


def _longest(rows: int, problems: int, threads: int) -> float:
    """Rows of the busiest thread, times threads: the kernel deals out slices of the problems, in order."""
    height = _height(rows)
    slices = -(-rows // height)
    most = -(-problems * slices // threads)
    short = slices * height - rows
    return min(float(threads * (most * height - most // slices * short)), float(threads * problems * rows))
