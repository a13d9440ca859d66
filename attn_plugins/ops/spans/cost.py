"""Which bands a CPU should run: a cost model of ATen's flash kernel, not autotuning.

Costs are in (query, key) pairs of one large dense call. The constants were fitted to about a hundred timed problems,
within 6 % (root of the mean square); those of float64 and one of bfloat16 were set by hand. `benchmarks/cpu_spans.py
--forms` times the forms beside what they should cost.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from attn_plugins.ops.spans.parts import ALIGNED, Band, Part, corners, edges, history, masked, tiles
from attn_plugins.plan.cost import SLICES
from attn_plugins.plan.spans import SpanRule

KEY_SPLIT = 512  # keys that the kernel takes at a time: in a causal call it skips only whole ones
CHUNKS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
MASKED_ROWS = 512  # up to here all rows may go in one masked call

# By bytes an element (`costed`); a pair also by the rows that the kernel takes at a time:
PAIR = {2: {256: 0.96, 64: 0.85, 32: 0.8}, 4: {256: 0.84, 64: 0.86, 32: 0.97}, 8: {256: 0.9, 64: 0.95, 32: 1.05}}
MASK = {2: 0.35, 4: 0.2, 8: 0.1}  # of a pair under a mask, besides
READ = {2: 120.0, 4: 26.0, 8: 15.0}  # of a key of a problem: fetched, and packed in half precision
GATHER = {2: 40.0, 4: 32.0, 8: 32.0}  # of a key of a part of several runs
RAGGED = {2: 190.0, 4: 90.0, 8: 50.0}  # of a row, if the keys are no round number
ROW = {2: 200.0, 4: 18.0, 8: 18.0}  # of a row of a part
MERGE = {2: 60.0, 4: 95.0, 8: 95.0}  # of a row of all parts but the first
FLIP = {2: 50.0, 4: 52.0, 8: 52.0}  # of a row of a flipped part
CALL = 90_000.0  # of a call
UNEVEN = 1.5  # a lone triangle: one of two threads has three quarters of it


def costed(itemsize: int) -> int:
    """Of which table a precision is: without AMX the kernel packs no keys, and its costs in 16 bits are those in 32."""
    return itemsize if itemsize != 2 or getattr(torch.cpu, "_is_amx_tile_supported", bool)() else 4


@functools.lru_cache(maxsize=1024)
def choose_bands(
    rule: SpanRule, start: int, rows: int, group: int, dim: int, itemsize: int, alone: bool = False
) -> tuple[Band, ...]:
    """The bands of least cost for the queries at positions `start .. start + rows`, of keys that end with them.

    `group`: query heads that share a KV head. `alone`: several threads would share a triangle of one head.
    """
    end = start + rows
    if rule.whole >= end:
        return (history(start, rows),)
    if not rule.whole:
        return (Band(start, rows, 1, ()),)
    boundary = max(start, rule.whole)
    lead = [history(start, boundary - start)] if boundary > start else []
    unaligned = min(-boundary % rule.grain, end - boundary)
    if unaligned:
        lead.append(tiles(rule, boundary, unaligned, 1))
        boundary += unaligned
    rest = end - boundary

    def cost(bands: Iterable[Band]) -> float:
        return sum(band_cost(band, group, itemsize, alone) for band in bands)

    def forms(at: int, chunk: int, count: int) -> list[Band]:
        found = (form(rule, at, chunk, count) for form in (tiles, edges, corners))
        return [band for band in found if band and mask_fits(band, rows * dim)]

    candidates = [[masked(start, rows)]] if end <= MASKED_ROWS else []
    if not rest:
        candidates.append(lead)
    for chunk in sorted({c for c in CHUNKS if c < rest} | {rest} if rest else ()):
        count, tail = divmod(rest, chunk)
        last = min(([band] for band in forms(end - tail, tail, 1)), key=cost, default=None) if tail else []
        if last is None:
            continue
        candidates += [[*lead, band, *last] for band in forms(boundary, chunk, count)]
    return tuple(min(candidates, key=cost))


def mask_fits(band: Band, most: int) -> bool:
    """A mask, which has the rows of a chunk, has at most so many entries: those of a head's queries."""
    return band.chunk <= CHUNKS[0] or all(not part.masked or part.count * band.chunk <= most for part in band.parts)


def band_cost(band: Band, group: int, itemsize: int, alone: bool = False) -> float:
    uneven = UNEVEN if alone and band.count == 1 else 1.0
    parts = sum(part_cost(part, band.chunk, group, itemsize) * (uneven if part.causal else 1) for part in band.parts)
    merged = MERGE[costed(itemsize)] * group * band.chunk * (len(band.parts) - 1)
    return (parts + merged) * band.count + CALL * len(band.parts)


def part_cost(part: Part, chunk: int, group: int, itemsize: int) -> float:
    """Of one chunk, for the heads of a group: their rows stand in one problem, but where the kernel's order counts."""
    problems, rows = (group, chunk) if part.causal else (1, group * chunk)
    height = next(height for least, height in SLICES if rows >= least)
    pairs = part.count * rows
    if part.causal:
        ends = (min(-(-(row + height) // KEY_SPLIT) * KEY_SPLIT, part.count) for row in range(0, rows, height))
        pairs = sum(ends) * rows // -(-rows // height)
    size = costed(itemsize)
    row = ROW[size] + part.flipped * FLIP[size] + (part.count % ALIGNED > 0) * RAGGED[size]
    key = READ[size] + (len(part.runs) > 1) * GATHER[size]
    return problems * (pairs * (PAIR[size][height] + part.masked * MASK[size]) + rows * row + part.count * key)
