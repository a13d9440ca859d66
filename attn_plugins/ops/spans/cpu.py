"""The CPU backend: bands of chunks, each a few attention calls over views of the keys, merged by LSE.

Heads of one span go together, a few chunks at a time, so that what the calls make is read again from a core's cache.
Plain PyTorch: it runs on any device. The backward takes the same parts, each with the output and LSE of all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from attn_plugins.ops.block_sparse.tile_attention import attend, attend_backward
from attn_plugins.ops.spans.cost import choose_bands
from attn_plugins.ops.spans.parts import Band, Part, balanced
from attn_plugins.plan.spans import Place, SpanRule

ROUND_BYTES = 1 << 23  # of queries and packed keys in one call, per thread
TURNS = 4  # in which a job's queries go where copies are wider
SHARE = 2  # and in all at most one part in so many of q, k and v


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: list[SpanRule], places: list[Place], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, N, D), k and v (B, H_kv, N_kv, D), a rule per query head, a place per item. Returns output and LSE."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for job in _jobs(q, k, v, rules, places, (out, lse)):
        job_out, job_lse = job.rows
        for band, bias in job.bands():
            if not band.parts:
                job.fill(band, job_out, 0.0)
                job.fill(band, job_lse, float("-inf"))
            for turn in _rounds(job, band, _budget(q, k)):
                into, into_lse = turn.chunks(job_out), turn.chunks(job_lse)
                found, found_lse = turn.attend(bias, scale)
                if band.joins:
                    _merge(into, into_lse, found, found_lse)
                else:
                    into.copy_(found)
                    into_lse.copy_(found_lse)
    for b, place in enumerate(places):
        first, last = place.rows(q.shape[2])
        for t, value in ((out, 0.0), (lse, float("-inf"))):
            t[b, :, :first] = value
            t[b, :, last:] = value
    return out, lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rules: list[SpanRule],
    places: list[Place],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, in their own layouts; summed in at least float32, in one fixed order."""
    grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    rows = (grad_q, grad_out, out, lse) if grad_lse is None else (grad_q, grad_out, out, lse, grad_lse)
    # The kernel shares its work out by head, and a gradient of the LSE needs wider copies of everything.
    most = max(1, q.shape[1] // 4, min(_threads(q), q.shape[1] // 2) if grad_lse is None else 1)
    turns = 1 if grad_lse is None else TURNS
    budget = _budget(q, k) // (2 * turns)
    for (item, kv, keys), jobs in itertools.groupby(_jobs(q, k, v, rules, places, rows, most), Job.keys_of):
        grads = [t[item, kv, keys] for t in (grad_k, grad_v)]
        sums = grads if q.dtype == lse.dtype else [torch.zeros_like(t, dtype=lse.dtype) for t in grads]
        for job in jobs:
            into, *given = job.rows
            for band, bias in job.bands(turns):
                for turn in _rounds(job, band, budget):
                    grad = turn.backward(given, sums, bias, scale)
                    turn.chunks(into).copy_(grad + turn.chunks(into) if band.joins else grad)
        if sums is not grads:
            for grad, total in zip(grads, sums, strict=True):
                grad.copy_(total)
    return grad_q, grad_k, grad_v


@dataclass
class Job:
    """Query heads of one rule in one item: (h, g, n, D), of which h or g is 1, over keys (h, M, D) that end with them.

    `rows`: other tensors of the queries, as q. `pieces`: a lone triangle is cut into so many (a power of two).
    """

    rule: SpanRule
    item: int
    kv: slice
    keys: slice
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rows: list[torch.Tensor]
    pieces: int

    def keys_of(self) -> tuple[int, slice, slice]:
        """Jobs on the same keys follow each other."""
        return self.item, self.kv, self.keys

    @property
    def start(self) -> int:
        """The position of the first query."""
        return self.k.shape[1] - self.q.shape[2]

    def bands(self, turns: int = 1) -> Iterator[tuple[Band, list[torch.Tensor | None]]]:
        """Each band with the masks of its parts; of the queries in so many turns."""
        group, rows, dim = self.q.shape[1:]
        step = -(-rows // turns)
        for first in range(0, rows, step):
            some = min(step, rows - first)
            size, alone = self.q.element_size(), self.pieces > 1 and len(self.q) * group == 1
            bands = choose_bands(self.rule, self.start + first, some, group, dim, size, alone)
            for band in itertools.chain.from_iterable(balanced(band, self.pieces) for band in bands):
                masks = (part.bias(self.rule, band.start, band.chunk, self.q.dtype) for part in band.parts)
                yield band, [None if m is None else self._mask(m) for m in masks]

    def _mask(self, mask: torch.Tensor) -> torch.Tensor:
        mask = mask.to(self.q.device)
        return (mask if self.q.shape[1] == 1 else mask.repeat(self.q.shape[1], 1))[None, None]

    def fill(self, band: Band, rows: torch.Tensor, value: float) -> None:
        first = band.start - self.start
        rows[:, :, first : first + band.chunk * band.count] = value


@dataclass
class Round:
    """Some chunks of a band, of some heads."""

    job: Job
    band: Band
    start: int  # the position of the first query
    count: int
    heads: slice

    def chunks(self, rows: torch.Tensor) -> torch.Tensor:
        """(h, g, n, ...) to (count, heads, chunk, ...), a view: heads are h or g, the other is 1."""
        first, chunk = self.start - self.job.start, self.band.chunk
        some = rows[self.heads, :, first : first + chunk * self.count].unflatten(2, (self.count, chunk))
        return some.movedim(2, 0).flatten(1, 2)

    def attend(self, bias: list[torch.Tensor | None], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Output (count, heads, chunk, D) and LSE of all parts."""
        q = self.chunks(self.job.q)
        out = lse = None
        for part, mask in zip(self.band.parts, bias, strict=True):
            tiles = self._problems(part, q)
            k, v = self._keys(part, tiles)
            one, one_lse = (self._chunks(part, t) for t in attend(tiles, k, v, mask, scale, part.causal))
            if out is None or lse is None:
                out, lse = one, one_lse
            else:
                rows = slice(one.shape[2])
                _merge(out[:, :, rows], lse[:, :, rows], one, one_lse)
        assert out is not None and lse is not None  # a band without parts has no rounds
        return out, lse

    def backward(
        self, rows: list[torch.Tensor], sums: list[torch.Tensor], bias: list[torch.Tensor | None], scale: float
    ) -> torch.Tensor:
        """The gradient of q as chunks; those of k and v are added to `sums` (h, M, D). `rows`: grad_out, out, lse.."""
        given = [self.chunks(t) for t in (*rows, self.job.q)]
        total = None
        for part, mask in zip(self.band.parts, bias, strict=True):
            grad_out, out, lse, *rest, tiles = (self._problems(part, t) for t in given)
            k, v = self._keys(part, tiles)
            grads = attend_backward(
                grad_out, rest[0] if rest else None, tiles, k, v, out, lse, mask, scale, part.causal
            )
            one = self._chunks(part, grads[0])
            if total is None:
                total = one if len(self.band.parts) == 1 else one.to(lse.dtype)
            else:
                total[:, :, : one.shape[2]] += one
            for into, grad in zip(sums, grads[1:], strict=True):
                grad = grad.sum(1, keepdim=True) if grad.shape[1] > into[self.heads].shape[0] else grad
                part.add(into[self.heads], grad, self.start, self.band.chunk)
        assert total is not None
        return total

    def _problems(self, part: Part, t: torch.Tensor) -> torch.Tensor:
        """Chunks as rows of a part's call: the heads of a group in one problem, but where the rows' order counts."""
        if part.causal:
            return t[:, :, :-1].flip(2) if part.flipped else t
        return t if self.job.q.shape[1] == 1 else t.flatten(1, 2)[:, None]

    def _chunks(self, part: Part, t: torch.Tensor) -> torch.Tensor:
        if part.causal:
            return t.flip(2) if part.flipped else t
        return t if self.job.q.shape[1] == 1 else t[:, 0].unflatten(1, (-1, self.band.chunk))

    def _keys(self, part: Part, tiles: torch.Tensor) -> list[torch.Tensor]:
        found = [part.read(t[self.heads], self.start, self.band.chunk, self.count) for t in (self.job.k, self.job.v)]
        return [t.expand(-1, tiles.shape[1], -1, -1) for t in found]


def _merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """In place: attention over two disjoint sets of keys, of which every query sees some of each."""
    total = torch.logaddexp(lse, other_lse)
    out.lerp_(other, torch.exp(other_lse - total)[..., None].to(out.dtype))
    lse.copy_(total)


def _threads(q: torch.Tensor) -> int:
    return torch.get_num_threads() if q.device.type == "cpu" else 16


def _budget(q: torch.Tensor, k: torch.Tensor) -> int:
    """Bytes of a round."""
    return min(_threads(q) * ROUND_BYTES, (q.numel() + 2 * k.numel()) * q.element_size() // SHARE)


def _rounds(job: Job, band: Band, budget: int) -> Iterator[Round]:
    """A lone chunk goes for all heads at once: its keys do not overlap, and more heads keep more threads busy."""
    if not band.parts:
        return
    heads, group, _, dim = job.q.shape
    each = (group * band.chunk + 2 * sum(part.count for part in band.parts)) * dim * job.q.element_size()
    together = heads if band.count == 1 else _even(heads, budget // (each * band.count))
    chunks = _even(band.count, budget // (each * together))
    for first in range(0, heads, together):
        for done in range(0, band.count, chunks):
            start, count = band.start + done * band.chunk, min(chunks, band.count - done)
            yield Round(job, band, start, count, slice(first, min(first + together, heads)))


def _even(total: int, most: int) -> int:
    """The size of equal turns, none of more than `most`."""
    return -(-total // -(-total // max(1, min(total, most))))


def _jobs(q, k, v, rules, places, others, most=None) -> Iterator[Job]:  # type: ignore[no-untyped-def]
    """At most so many heads of one rule that lie side by side; of one KV head, if it has several query heads."""
    group = q.shape[1] // k.shape[1]
    runs = []
    first = 0
    for head in range(1, q.shape[1] + 1):
        ends = head == q.shape[1] or rules[head] != rules[first] or (group > 1 and head % group == 0)
        if ends or head - first == most:
            runs.append((first, head))
            first = head
    for item, place in enumerate(places):
        a, b = place.rows(q.shape[2])
        if a == b:
            continue
        keys = slice(place.first, place.start + b)
        plain = all(rule.whole >= keys.stop - keys.start for rule in rules)  # as dense attention has it, to the bit
        for first, last in runs:
            pieces = 1 if plain else 1 << (-(-_threads(q) // (last - first)) - 1).bit_length()
            kv = slice(first // group, (last - 1) // group + 1)
            rows = [_heads(t[item, first:last, a:b], group) for t in (q, *others)]
            yield Job(rules[first], item, kv, keys, rows[0], k[item, kv, keys], v[item, kv, keys], rows[1:], pieces)


def _heads(t: torch.Tensor, group: int) -> torch.Tensor:
    """(heads, n, ...) to (h, g, n, ...)."""
    return t[:, None] if group == 1 else t[None]
