"""The ranges on the host, and the parts that the plain PyTorch forms work on: views of k and v, never copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ALL = slice(None)
HostRanges = list[list[list[tuple[int, int]]]]  # of each batch item (or of all), of each KV head: (start, end)


@dataclass(frozen=True)
class Part:
    """One range of each of `heads` neighbouring KV heads, of equal lengths and evenly spaced, for some batch items."""

    items: slice
    first: int
    heads: int
    start: int
    step: int
    length: int

    @property
    def kv(self) -> slice:
        return slice(self.first, self.first + self.heads)

    def singles(self) -> list[Part]:
        """One part for each head."""
        heads = range(self.heads)
        return [Part(self.items, self.first + n, 1, self.start + n * self.step, 0, self.length) for n in heads]

    def piece(self, low: int, length: int) -> Part:
        """Some of the tokens of every head."""
        return Part(self.items, self.first, self.heads, self.start + low, self.step, length)

    def rows(self, t: torch.Tensor) -> torch.Tensor:
        """(B, H_kv, ...) to (items, heads, ...), a view."""
        t = t.narrow(1, self.first, self.heads)
        return t if self.items == ALL else t[self.items]

    def read(self, t: torch.Tensor) -> torch.Tensor:
        """(1 or B, total, ...) to (items or 1, heads, length, ...), a view."""
        t = t if t.shape[0] == 1 or self.items == ALL else t[self.items]
        shape = (t.shape[0], self.heads, self.length, *t.shape[2:])
        strides = (t.stride(0), self.step * t.stride(1), *t.stride()[1:])
        return t.as_strided(shape, strides, t.storage_offset() + self.start * t.stride(1))


def host_ranges(values: Sequence[int], shape: Sequence[int], total: int) -> HostRanges:
    """The non-empty ranges, ascending, of the flat values of a tensor of this shape.

    Raises:
        ValueError: a range that leaves the tokens, or two of a head that overlap.
    """
    found = []
    items, heads, count, _ = shape
    each = 2 * heads * count
    for item in range(items):
        ends = values[item * each : (item + 1) * each]
        pairs = list(zip(ends[::2], ends[1::2], strict=True))
        rows = [
            sorted(pair for pair in pairs[head * count : (head + 1) * count] if pair[1] > pair[0])
            for head in range(heads)
        ]
        for head, row in enumerate(rows):
            last = 0
            for start, end in row:
                if start < 0 or end > total:
                    raise ValueError(f"range [{start}, {end}) of KV head {head}: k has tokens [0, {total})")
                if start < last:
                    raise ValueError(f"range [{start}, {end}) of KV head {head} begins before {last}, where one ends")
                last = end
        found.append(rows)
    return found


def parts_of(ranges: HostRanges) -> list[list[Part]]:
    """First ranges of all heads, second ranges, ...; neighbouring heads are one part where that is a view."""
    places: list[list[Part]] = []
    for item, rows in enumerate(ranges):
        items = ALL if len(ranges) == 1 else slice(item, item + 1)
        for place in range(max(map(len, rows))):
            if place == len(places):
                places.append([])
            runs: list[Part] = []
            for head, row in enumerate(rows):
                if place >= len(row):
                    continue
                start, end = row[place]
                joined = _joined(runs[-1], head, start, end - start) if runs else None
                if joined is None:
                    runs.append(Part(items, head, 1, start, 0, end - start))
                else:
                    runs[-1] = joined
            places[place] += runs
    return places


def _joined(run: Part, head: int, start: int, length: int) -> Part | None:
    """A run and the range of the next head as one part, if that is a view."""
    step = start - run.start if run.heads == 1 else run.step
    fits = head == run.first + run.heads and length == run.length and start == run.start + run.heads * step
    return Part(run.items, run.first, run.heads + 1, run.start, step, length) if fits and step >= 0 else None
