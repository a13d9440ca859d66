"""A band of queries cut into chunks, and the parts that the keys of a chunk come in: each is one attention call.

Chunks of a band are alike, so a part is a run of keys that moves along with the chunk, read as a view; parts are
disjoint, and their results merge by LSE.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from attn_plugins.ops.block_sparse.tile_attention import bias_of
from attn_plugins.plan.spans import SpanRule

ALIGNED = 64  # keys: of other numbers the last ones take the kernel up to twice the time


@dataclass(frozen=True)
class Run:
    """`count` keys of each chunk, from `offset` after its first query on; `fixed`: from key `offset` on, for all."""

    offset: int
    count: int
    fixed: bool = False

    def read(self, keys: torch.Tensor, start: int, chunk: int, chunks: int) -> torch.Tensor:
        """(h, M, D) to (chunks, h, count, D), a view; the first chunk begins at query `start`."""
        heads, tokens, channels = keys.stride()
        step, first = (0, self.offset) if self.fixed else (chunk * tokens, start + self.offset)
        shape = (chunks, keys.shape[0], self.count, keys.shape[2])
        return keys.as_strided(shape, (step, heads, tokens, channels), keys.storage_offset() + first * tokens)

    def add(self, keys: torch.Tensor, values: torch.Tensor, start: int, chunk: int) -> None:
        """Add (chunks, h, count, D) to the keys, chunk after chunk: the order of the sums is fixed."""
        if self.fixed:
            keys[:, self.offset : self.offset + self.count] += values.sum(0)
            return
        for number, value in enumerate(values):
            first = start + number * chunk + self.offset
            keys[:, first : first + self.count] += value

    def seen(self, rule: SpanRule, i: torch.Tensor, start: int) -> torch.Tensor:
        """Which keys of the first chunk the queries at `i` (n, 1) see; sinks are keys of fixed runs alone."""
        if self.fixed:
            return rule.sees(i, torch.arange(self.offset, self.offset + self.count))
        j = torch.arange(self.count) + (start + self.offset)
        return (j <= i) & (j >= rule.first(i))


@dataclass(frozen=True)
class Part:
    """Keys of each chunk: seen by all its queries, or masked by the rule, or one triangle.

    `causal`: query r sees the keys up to r. With `flipped` those after r: causal from the far end, where the last query
    has no row.
    """

    runs: tuple[Run, ...]
    masked: bool = False
    causal: bool = False
    flipped: bool = False

    @property
    def count(self) -> int:
        return sum(run.count for run in self.runs)

    def read(self, keys: torch.Tensor, start: int, chunk: int, chunks: int) -> torch.Tensor:
        """(h, M, D) to (chunks, h, count, D): a view where the part is one run, not flipped."""
        found = [run.read(keys, start, chunk, chunks) for run in self.runs]
        joined = found[0] if len(found) == 1 else torch.cat(found, dim=2)
        return joined.flip(2) if self.flipped else joined

    def add(self, keys: torch.Tensor, values: torch.Tensor, start: int, chunk: int) -> None:
        values = values.flip(2) if self.flipped else values
        for run, value in zip(self.runs, values.split([run.count for run in self.runs], dim=2), strict=True):
            run.add(keys, value, start, chunk)

    def bias(self, rule: SpanRule, start: int, chunk: int, dtype: torch.dtype) -> torch.Tensor | None:
        """(chunk, count): what the rule hides from the queries of a chunk; of the first, as all are alike."""
        if not self.masked:
            return None
        if not all(run.fixed for run in self.runs):  # then every chunk has the same, wherever the band begins
            start = rule.whole + ALIGNED + (start - rule.whole - ALIGNED) % rule.grain
        return _bias(self, rule, start, chunk, dtype)


@functools.lru_cache(maxsize=16)
def _bias(part: Part, rule: SpanRule, start: int, chunk: int, dtype: torch.dtype) -> torch.Tensor:
    i = torch.arange(start, start + chunk)[:, None]
    seen = torch.cat([run.seen(rule, i, start) for run in part.runs], dim=1)
    return bias_of(seen, dtype)


@dataclass(frozen=True)
class Band:
    """`count` chunks of `chunk` queries, from position `start` on; all of them see something, if there is a part."""

    start: int
    chunk: int
    count: int
    parts: tuple[Part, ...]
    joins: bool = False  # what an earlier band found for the same queries


def balanced(band: Band, pieces: int) -> tuple[Band, ...]:
    """A lone causal chunk in `pieces` (a power of two) triangles, one call, and the squares between them.

    The kernel gives each thread as many rows, and in a triangle the last rows have nearly all the work.
    """
    if not band.parts:
        return (band,)
    own, *before = band.parts
    size = band.chunk // (pieces * ALIGNED) * ALIGNED
    if pieces == 1 or not size or not own.causal or band.count > 1 or any(part.flipped for part in before):
        return (band,)
    done, bands = size * pieces, [Band(band.start, size, pieces, (Part((Run(0, size),), causal=True),))]
    side = size
    while side < done:
        square = (Part((Run(-side, side),)),)
        bands += [Band(at, side, 1, square, True) for at in range(band.start + side, band.start + done, 2 * side)]
        side *= 2
    if before:
        bands.append(Band(band.start, done, 1, tuple(before), True))
    if done < band.chunk:
        bands.append(history(band.start + done, band.chunk - done))
    return tuple(bands)


def history(start: int, rows: int) -> Band:
    """Plain causal attention: all that came before."""
    before = (Part((Run(0, start, fixed=True),)),) if start else ()
    return Band(start, rows, 1, (Part((Run(0, rows),), causal=True), *before))


def masked(start: int, rows: int) -> Band:
    """All rows and keys in one masked call: for the smallest problems."""
    return Band(start, rows, 1, (Part((Run(0, start + rows, fixed=True),), masked=True),))


def tiles(rule: SpanRule, start: int, chunk: int, count: int) -> Band:
    """The window of a chunk in one masked call."""
    low = rule.first(start) - start
    parts = [Part((_window(start, low, chunk, 0),), masked=True)] if rule.span else []
    return Band(start, chunk, count, (*parts, *_sinks(rule)))


def edges(rule: SpanRule, start: int, chunk: int, count: int) -> Band | None:
    """What all rows of a chunk see, without a mask; and the rest, sinks too, gathered under one."""
    low, whole = (rule.first(i) - start for i in (start, start + chunk - 1))
    inner = -whole // ALIGNED * ALIGNED
    if inner <= 0:
        return None
    sinks = (Run(0, rule.sink, fixed=True),) if rule.sink else ()
    left = (_window(start, low, -inner, rule.sink + chunk),) if low < -inner else ()
    return Band(start, chunk, count, (Part((*sinks, *left, Run(0, chunk)), masked=True), Part((Run(-inner, inner),))))


def corners(rule: SpanRule, start: int, chunk: int, count: int) -> Band | None:
    """No mask at all: the chunk itself is causal, the oldest chunk of the window is so from its far end."""
    if rule.grain > 1 or chunk > rule.span or chunk == 1:
        return None
    own, oldest = Part((Run(0, chunk),), causal=True), Part((Run(-rule.span, chunk),), causal=True, flipped=True)
    between = (Part((Run(chunk - rule.span, rule.span - chunk),)),) if chunk < rule.span else ()
    return Band(start, chunk, count, (own, oldest, *between, *_sinks(rule)))


def _window(start: int, low: int, high: int, others: int) -> Run:
    """Keys from `low` to `high`; with `others` in the same part, some more before them make the number a round one."""
    more = -(high - low + others) % ALIGNED
    low -= more if start + low >= more else 0
    return Run(low, high - low)


def _sinks(rule: SpanRule) -> tuple[Part, ...]:
    return (Part((Run(0, rule.sink, fixed=True),)),) if rule.sink else ()
