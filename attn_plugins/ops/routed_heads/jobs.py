"""The work of one call: KV heads with about as many rows to compute stand side by side in one attention call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from attn_plugins.ops.routed_heads.cost import SURE, SURE_CAUSAL, Chunk, Place, dense_cost, gather_cost, joined
from attn_plugins.ops.routed_heads.inputs import query_offset
from attn_plugins.ops.routed_heads.rows import Rows

SPARE = 12  # heads go together where at most about one row in so many is only there to make them even
SPREAD = 1.5  # and where, of causal rows, the keys that only some see are at most so many times those of one head
CHUNK_ROWS = (192, 256, 384, 512, 768, 1024, 2048, 4096)  # of causal rows of a KV head
NEARLY_ALL = 0.93  # of the rows: whatever it costs besides, gathering them cannot pay
MOST = 0.7  # of a causal call's rows, in every head: measured, with two threads
ROUND_BYTES = 1 << 24  # of a mask in one call


@dataclass(frozen=True)
class Part:
    """Keys [first, end): seen whole, by row r up to the r-th (`causal`), or by each row up to its own (`masked`)."""

    first: int
    end: int
    causal: bool = False
    masked: bool = False


@dataclass(frozen=True)
class Job:
    """Rows of some KV heads of an item, and the keys that they see, in parts that are merged by LSE.

    Gathered: `starts` and `sizes`, for each head, where its rows stand in the list. Dense: all rows `start .. stop` of
    q, of all its query heads; the result of some of them is not wanted if it is `partial`.
    """

    item: int
    kv: list[int]
    parts: list[Part]
    starts: list[int] | None = None
    sizes: list[int] | None = None
    start: int = 0
    stop: int = 0
    partial: bool = False

    def pieces(self, step: int) -> Iterator[Job]:
        """The same, of at most so many heads each."""
        for at in range(0, len(self.kv), step):
            some = slice(at, at + step)
            starts, sizes = (None if row is None else row[some] for row in (self.starts, self.sizes))
            yield replace(self, kv=self.kv[some], starts=starts, sizes=sizes)


@dataclass(frozen=True)
class Shape:
    """What of the tensors a choice depends on."""

    group: int
    itemsize: int
    threads: int


def jobs_of(rows: Rows, bounds: list[tuple[int, int]], q: torch.Tensor, k: torch.Tensor, causal: bool) -> list[Job]:
    """The jobs for some rows; [first, end) are each item's keys."""
    kv_heads = k.shape[1]
    threads = torch.get_num_threads() if q.device.type == "cpu" else 16
    shape = Shape(q.shape[1] // kv_heads, q.element_size(), threads)
    jobs: list[Job] = []
    for item, (first, end) in enumerate(bounds):
        place = place_of(first, end, q.shape[2], k.shape[2], causal)
        dense, gathered = [], []
        for kv in _alike(rows.sizes[item]):
            chunks = _chunks(rows, item, kv, place, shape)
            if chunks:
                gathered += [job for some, chunk in chunks for job in _gathered(rows, item, some, chunk, place, shape)]
            else:
                dense += kv
        if dense:
            wanted = sum(rows.sizes[item][kv] for kv in dense)
            partial = wanted < len(dense) * shape.group * (place.stop - place.start)
            jobs.append(_dense(item, sorted(dense), place, partial))
        jobs += gathered
    return jobs


def plainly_dense(mask: torch.Tensor, bounds: list[tuple[int, int]], keys: int, group: int) -> list[Job]:
    """The jobs of a causal call that no list is worth making for, as every head has most of the tokens; else none."""
    batch, length, heads = mask.shape
    if not mask.numel() or int(mask.sum(1).min()) < MOST * length:
        return []
    places = [place_of(first, end, length, keys, True) for first, end in bounds]
    return [_dense(item, list(range(heads // group)), place, True) for item, place in enumerate(places)]


def place_of(first: int, end: int, queries: int, keys: int, causal: bool) -> Place:
    offset = query_offset(queries, keys, causal)
    if offset is None:
        return Place(0, queries, first, end, 0, False)
    start = min(max(first - offset, 0), queries)
    return Place(start, max(min(end - offset, queries), start), first, end, offset, causal)


def _alike(sizes: list[int]) -> Iterator[list[int]]:
    """KV heads that have rows, in groups of about equal sizes, ascending within."""
    left = sorted((kv for kv, size in enumerate(sizes) if size), key=lambda kv: -sizes[kv])
    while left:
        least = sizes[left[0]] * (1 - 1 / SPARE)
        count = sum(sizes[kv] >= least for kv in left)
        yield sorted(left[:count])
        left = left[count:]


Chunks = list[tuple[list[int], tuple[int, int, Chunk]]]  # heads, (number, of so many, chunk)


def _chunks(rows: Rows, item: int, kv: list[int], place: Place, shape: Shape) -> Chunks:
    """In which chunks to gather the rows of some KV heads; none where computing all of their rows costs less."""
    sizes = rows.sizes[item]
    most = max(sizes[n] for n in kv)
    if most > NEARLY_ALL * shape.group * (place.stop - place.start):
        return []
    sure = SURE_CAUSAL if place.causal else SURE
    best, least = [], sure * dense_cost(place, shape.group * len(kv), shape.itemsize, shape.threads)
    counts = {-(-most // size) for size in CHUNK_ROWS} if place.causal else {1}
    for count in sorted(counts):
        found: Chunks = []
        cost = 0.0
        for number in range(count):
            for some, chunk in _together(rows, item, kv, number, count, place):
                cost += gather_cost([chunk], place, len(some), shape.itemsize, shape.threads)
                found.append((some, (number, count, chunk)))
        if cost < least:
            best, least = found, cost
    return best


def _together(
    rows: Rows, item: int, kv: list[int], number: int, count: int, place: Place
) -> Iterator[tuple[list[int], Chunk]]:
    """The heads' chunks of this number: as one, or each alone where they see keys that are too different."""
    found = []
    for n in kv:
        first, last = _cut(rows.sizes[item][n], number, count)
        if first < last:
            found.append((n, _span(rows, rows.starts[item][n], first, last, place)))
    if not found:
        return
    low, high = min(chunk.low for _, chunk in found), max(chunk.high for _, chunk in found)
    own = sum(chunk.high - chunk.low for _, chunk in found)
    if not place.causal or (high - low) * len(found) <= SPREAD * own + len(found) * 64:
        yield [n for n, _ in found], Chunk(max(chunk.rows for _, chunk in found), low, high)
    else:
        yield from (([n], chunk) for n, chunk in found)


def _cut(size: int, number: int, count: int) -> tuple[int, int]:
    return number * size // count, (number + 1) * size // count


def _span(rows: Rows, start: int, first: int, last: int, place: Place) -> Chunk:
    if not place.causal:
        return Chunk(last - first, place.end, place.end)
    low, high = int(rows.places[start + first]), int(rows.places[start + last - 1])
    return Chunk(last - first, place.offset + low, place.offset + high + 1)


def _gathered(
    rows: Rows, item: int, kv: list[int], cut: tuple[int, int, Chunk], place: Place, shape: Shape
) -> Iterator[Job]:
    number, count, chunk = cut
    if not place.causal:
        parts = [Part(place.first, place.end)]
    elif chunk.low == place.first or joined(chunk, place, len(kv), shape.itemsize):
        parts = [Part(place.first, chunk.high, masked=True)]
    else:
        parts = [Part(place.first, chunk.low), Part(chunk.low, chunk.high, masked=True)]
    mask_bytes = max((part.end - part.first for part in parts if part.masked), default=0) * chunk.rows * shape.itemsize
    rounds = min(-(-len(kv) * mask_bytes // ROUND_BYTES), -(-len(kv) // shape.threads)) or 1
    step = -(-len(kv) // rounds)
    for at in range(0, len(kv), step):
        some = kv[at : at + step]
        cuts = [_cut(rows.sizes[item][n], number, count) for n in some]
        starts = [rows.starts[item][n] + first for n, (first, _) in zip(some, cuts, strict=True)]
        yield Job(item, some, parts, starts, [last - first for first, last in cuts])


def _dense(item: int, kv: list[int], place: Place, partial: bool) -> Job:
    if not place.causal:
        parts = [Part(place.first, place.end)]
    else:
        diagonal = place.offset + place.start
        parts = [Part(place.first, diagonal)] if diagonal > place.first else []
        parts.append(Part(diagonal, place.offset + place.stop, causal=True))
    return Job(item, kv, parts, start=place.start, stop=place.stop, partial=partial)
