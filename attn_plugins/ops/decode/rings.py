"""Ring buffers of keys and values, one per KV head and as long as it needs, packed without padding (`Layout`).

A token at position p takes place p of its head if it is a sink, else place `sink + (p - sink) mod ring`: the newest
take the places of the oldest, and the sinks stay. Positions are counted from an item's first real token, so that sinks
are real tokens. Places of all heads are slots of one tensor. A table says which position each slot holds; what it does
not hold is `EMPTY`, a position behind all others, which nothing looks back to. A last slot takes what nobody keeps, and
is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins.ops.block_sparse.tile_attention import attend
from attn_plugins.ops.checks import resolve_scale
from attn_plugins.ops.decode import decode_attention
from attn_plugins.ops.decode.layout import Layout

EMPTY = 2**31 - 1
BLOCK = 64


@dataclass
class Ordered:
    """What rings hold of the tokens before some position, in order, for heads of any ring alike.

    keys, values: (B, H_kv, C, D). positions: (1 or B, H_kv, C), EMPTY where a head does not hold the token. before:
    (1 or B,) how many of the C columns of an item stand for nothing, in front; of the others the first are the sinks.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    before: torch.Tensor


class Rings:
    """The kept tokens of one layer.

    Args:
        spans: tokens that each query head looks back, (H,); a ring has the most of its KV head's group.
        sink: first tokens that are kept for good.
        key, value: (B, H_kv, any, D): what will be written is like them.

    Attributes:
        keys, values: (B, total + 1, D), packed.
        positions: (1 or B, total + 1) int64, a row for all items as long as they stand alike.
        alike: whether they do: there was no padding, and a token's position is how many came before.
        gaps: () bool, whether some item may have padding between its tokens.
    """

    def __init__(self, spans: Sequence[int], sink: int, key: torch.Tensor, value: torch.Tensor) -> None:
        batch, kv_heads = key.shape[:2]
        if not spans or len(spans) % kv_heads:
            raise ValueError(f"{len(spans)} spans for {kv_heads} KV heads: give one per query head")
        group, device = len(spans) // kv_heads, key.device
        self.spans, self.sink = tuple(spans), sink
        self.sizes = [max(spans[h * group : (h + 1) * group]) for h in range(kv_heads)]  # of the rings, without sinks
        self.even = all(span == self.sizes[h // group] for h, span in enumerate(spans))
        self.layout = Layout.of([size + sink for size in self.sizes])
        self.total = self.layout.total
        self.ring = torch.tensor(self.sizes, device=device)
        self.start, self.main, self.rest = (
            torch.tensor(t, device=device) for t in (self.layout.starts, self.layout.mains, self.layout.rests)
        )
        self.span = torch.tensor(self.spans, device=device)
        self.ranges = torch.tensor(self.layout.ranges(), device=device)[None]
        # zeros: an empty slot weighs nothing, and nothing times what memory happens to hold may be NaN
        self.keys = key.new_zeros(batch, self.total + 1, key.shape[3])
        self.values = value.new_zeros(batch, self.total + 1, value.shape[3])
        self.positions = torch.full((1, self.total + 1), EMPTY, dtype=torch.int64, device=device)
        self._ranges: dict[int, torch.Tensor] = {}  # on a CPU, of the last number of tokens
        self.alike = True
        self.gaps = torch.zeros((), dtype=torch.bool, device=device)

    @property
    def nbytes(self) -> int:
        """Of keys and values; the table of positions is a hundredth of that."""
        return self.keys.nbytes + self.values.nbytes

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """(..., n) to (..., H_kv, n): where tokens at these positions stand, if they are kept."""
        p = positions[..., None, :]
        return self._slots(p, *(t[:, None] for t in (self.ring, self.start, self.main, self.rest)))

    def _slots(
        self, p: torch.Tensor, ring: torch.Tensor, start: torch.Tensor, main: torch.Tensor, rest: torch.Tensor
    ) -> torch.Tensor:
        """Of tokens at positions p, from what each one's head has."""
        place = torch.where(p < self.sink, p, self.sink + (p - self.sink) % ring.clamp(min=1))
        slots = place + start
        return torch.where(place < main, slots, place - main + rest) if self.layout.parted else slots

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor | int,
        real: torch.Tensor | None = None,
    ) -> None:
        """Take tokens in: key, value (B, H_kv, n, D) at positions (1 or B, n), consecutive, behind all earlier ones.

        An int is the position of the first one, where all items stand alike. `real` (B, n) bool: the others are
        padding, and are not kept.
        """
        if isinstance(positions, int):
            if key.shape[2] == 1 and key.device.type == "cpu":  # there, small operations are what a step costs
                return self._write_one(key, value, positions)
            positions = torch.arange(positions, positions + key.shape[2], device=key.device)[None]
        p = positions
        if real is not None:
            p = torch.where(real, positions, -1)
            self.gaps.logical_or_((~real & (positions >= 0)).any())
        end = p.amax(-1)[:, None, None] + 1
        p = p[:, None]
        kept = (p >= 0) & ((p < self.sink) | (p >= end - self.ring[:, None]))
        slots = torch.where(kept, self.slots(p[:, 0]), self.total).flatten(1)
        if real is not None:
            self.by_item()
        for held, new in ((self.keys, key), (self.values, value)):
            _put(held, slots, new.flatten(1, 2) if new.shape[2] > 1 else new[:, :, 0])
        rows = self.positions.shape[0]
        self.positions.scatter_(1, slots.expand(rows, -1), p.expand(rows, self.ring.shape[0], -1).flatten(1))

    def _write_one(self, key: torch.Tensor, value: torch.Tensor, p: int) -> None:
        turns = [p if p < self.sink else self.sink + (p - self.sink) % max(ring, 1) for ring in self.sizes]
        last = self.total  # for heads that keep sinks alone
        slots = torch.tensor(
            [
                self.layout.slot(head, turn) if ring or p < self.sink else last
                for head, (turn, ring) in enumerate(zip(turns, self.sizes, strict=True))
            ]
        )
        self.keys.index_copy_(1, slots, key[:, :, 0])
        self.values.index_copy_(1, slots, value[:, :, 0])
        self.positions.index_fill_(1, slots, p)

    def by_item(self) -> None:
        """Give each item a row of its own in the table of positions."""
        self.alike = False
        if self.positions.shape[0] != self.keys.shape[0]:
            self.positions = self.positions.repeat(self.keys.shape[0], 1)

    def attend(
        self, q: torch.Tensor, positions: torch.Tensor | int, written: int | None, scale: float | None, backend: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q (B, H, 1, D) of the newest tokens, at positions (1 or B, 1), or one for all, over all that is kept.

        `written`: tokens since the rings were empty, where the host knows; slots behind them are left out. Returns
        output and LSE.
        """
        short = written is not None and written <= min(self.spans)
        uneven, cpu = not (self.alike and (self.even or short)), q.device.type == "cpu"
        if cpu and not uneven and written is not None and backend in ("auto", "cpu"):
            held = min(written, self.sizes[0] + self.sink)
            if all(size == self.sizes[0] for size in self.sizes):
                return self._as_dense(q, held, scale)
        ranges, partial = self.ranges, False
        if written is not None and written < max(self.sizes) + self.sink:
            if not cpu:
                ranges = self._held(written)
            elif len(set(self.sizes)) == 1:  # one part, whatever its length
                ranges = self._first(written)
            else:  # tiles, which are worth keeping for some steps: what nothing holds yet is hidden
                ranges, partial = self._first(-(-written // BLOCK) * BLOCK), True
        rule: dict[str, Any] = {}
        if uneven or partial:  # else every query head sees all that its ring holds
            if isinstance(positions, int):
                positions = torch.full((1, 1), positions, device=q.device)
            rule = {"key_positions": self.positions, "query_positions": positions}
            if uneven:
                rule |= {"spans": self.span, "sink": self.sink}
        return decode_attention(  # type: ignore[return-value]
            q, self.keys, self.values, ranges=ranges, scale=scale, backend=backend, return_lse=True, **rule
        )

    def _as_dense(self, q: torch.Tensor, held: int, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Rings of one size are a dense cache: at short texts, all of them are, and there each operation counts."""
        kv_heads, size = len(self.sizes), self.sizes[0] + self.sink
        keys, values = (
            t[:, : self.total].unflatten(1, (kv_heads, size))[:, :, :held] for t in (self.keys, self.values)
        )
        out, lse = attend(
            q.reshape(q.shape[0], kv_heads, -1, q.shape[3]), keys, values, None, resolve_scale(scale, q.shape[3])
        )
        return torch.empty_like(q).copy_(out.reshape(q.shape)), lse.reshape(q.shape[:3])

    def _first(self, places: int) -> torch.Tensor:
        """The first places of every ring, or all that it has."""
        if places not in self._ranges:
            self._ranges = {places: torch.tensor(self.layout.ranges(places))[None]}
        return self._ranges[places]

    def _held(self, places: int) -> torch.Tensor:
        """The same on the device, where nothing is copied to it at every step."""
        main = self.main.clamp(max=places)
        ends = [torch.stack([self.start, self.start + main], dim=-1)]
        if self.layout.parted:
            others = (self.ring + self.sink).clamp(max=places) - main
            ends.append(torch.stack([self.rest, self.rest + others], dim=-1))
        return torch.stack(ends, dim=1)[None]

    def ordered(self, end: torch.Tensor, written: int | None = None, grain: int = 1) -> Ordered:
        """The tokens before position `end` (1 or B,), as long as the longest ring, shorter items to the right.

        The first column behind the sinks is a multiple of `grain` tokens from them. `written` as in `attend`.
        """
        columns = self.sink + max(self.sizes) + grain - 1
        columns = columns if written is None else min(columns, written)
        end = end.clamp(min=0)[:, None]
        low = (end - max(self.sizes)).clamp(min=self.sink)
        low = low - (low - self.sink) % grain
        held = torch.minimum(end, self.sink + end - low)
        column = torch.arange(columns, device=end.device) - (columns - held)
        p = torch.where(column < self.sink, column, end - held + column)
        slots = self.slots(p.clamp(min=0))
        rows = self.positions.shape[0]
        table = self.positions.gather(1, slots.flatten(1).expand(rows, -1)).view(rows, -1, columns)
        found = torch.where((table == p[:, None]) & (column >= 0)[:, None], table, EMPTY)
        keys, values = (_take(t, slots.flatten(1)).unflatten(1, slots.shape[1:]) for t in (self.keys, self.values))
        return Ordered(keys, values, found, columns - held[:, 0])

    def select(self, items: torch.Tensor) -> None:
        """Keep some items of the batch, in this order."""
        self.keys, self.values = (t.index_select(0, items.to(t.device)) for t in (self.keys, self.values))
        if self.positions.shape[0] > 1:
            self.positions = self.positions.index_select(0, items.to(self.positions.device))

    def clear(self) -> None:
        """Forget all tokens."""
        self.positions.fill_(EMPTY)
        self.gaps.fill_(False)

    def resized(self, spans: Sequence[int]) -> Rings:
        """Rings for spans that are nowhere shorter, with the same tokens in them."""
        kv_heads = len(self.sizes)
        like = [t[:, None, :1].expand(-1, kv_heads, -1, -1) for t in (self.keys, self.values)]
        found = Rings(spans, self.sink, *like)
        if any(new < old for new, old in zip(found.sizes, self.sizes, strict=True)):
            raise ValueError(f"rings of {self.sizes} tokens cannot shrink to {found.sizes}: tokens would be lost")
        found.gaps.copy_(self.gaps)
        areas = torch.cat([self.main, self.ring + self.sink - self.main])  # whose each slot is, in their order
        head = torch.repeat_interleave(areas, output_size=self.total) % kv_heads
        p = self.positions[:, : self.total]
        slots = found._slots(p, *(t[head] for t in (found.ring, found.start, found.main, found.rest)))
        slots = torch.where(p == EMPTY, found.total, slots)
        if not self.alike:
            found.by_item()
        for new, old in ((found.keys, self.keys), (found.values, self.values)):
            _put(new, slots, old[:, : self.total])
        found.positions.scatter_(1, slots, p)
        return found


def _put(held: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """rows (B, n, D) to slots (1 or B, n) of held (B, total, D)."""
    if slots.shape[0] == 1:
        held.index_copy_(1, slots[0], rows)
    else:
        held.scatter_(1, slots[..., None].expand(-1, -1, held.shape[2]), rows)


def _take(held: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """held (B, total, D) at slots (1 or B, n), (B, n, D)."""
    if slots.shape[0] == 1:
        return held.index_select(1, slots[0])
    return held.gather(1, slots[..., None].expand(-1, -1, held.shape[2]))
