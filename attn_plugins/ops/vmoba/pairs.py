"""(query, block) pairs in two orders: by block, as they are attended together, and by query, as they are merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

CHUNK_ROWS = 8192  # queries that go in one attention call, if a visit has no more


@dataclass(frozen=True)
class Chunk:
    """Visits of one number of keys that go in one call; shorter ones are filled up with their last query.

    Attributes:
        at: the places of what they give, as many as rows.
        rows: (V, n) int64, the rows of queries.
        filling: (V, n) bool, those that are no pairs; None if there are none.
        heads, blocks: (V,) int64, the head and the block of each visit.
        own: whether all are visits of a block's own queries to it.
    """

    at: slice
    rows: torch.Tensor
    filling: torch.Tensor | None
    heads: torch.Tensor
    blocks: torch.Tensor
    own: bool


@dataclass(frozen=True)
class Pairs:
    """The pairs of some heads and queries; row `h * R + r` is query `r` of head `h`.

    Attributes:
        chunks: by block.
        bag: (P,) int64, the places of what a row's visits give, row after row.
        offsets: (H * R,) int64, where each row begins in `bag`.
        most: the most pairs that a row has.
        places: how many there are.
    """

    chunks: list[Chunk]
    bag: torch.Tensor
    offsets: torch.Tensor
    most: int
    places: int

    @classmethod
    def of(cls, selected: torch.Tensor, sizes: torch.Tensor, own: torch.Tensor | None = None) -> Pairs:
        """From (H, R, blocks) bool and the blocks' sizes.

        `own`: (R,) the block of each query; visits to it are then apart from the others.
        """
        heads, count, blocks = selected.shape
        by_block = selected.permute(2, 0, 1).contiguous()  # (blocks, H, R)
        rows = by_block.flatten(1).nonzero()[:, 1]
        numbers = [by_block.sum(-1)]
        if own is not None:  # a block's own queries come before later ones
            mine = (own == torch.arange(blocks, device=own.device)[:, None])[:, None].expand_as(by_block).sum(-1)
            numbers = [mine, numbers[0] - mine]
        number = torch.stack(numbers, dim=-1).flatten()  # (blocks, H, parts), in the order of pairs
        per_row = selected.sum(-1).flatten()
        host = torch.cat([per_row.max()[None], number]).tolist()
        chunks, position, places = _chunks(number, host[1:], rows, heads, len(numbers), sizes)
        ends = by_block.flatten().cumsum(0)
        row, block = torch.nonzero(selected.flatten(0, 1), as_tuple=True)
        return cls(
            chunks, position[ends[block * heads * count + row] - 1], per_row.cumsum(0) - per_row, host[0], places
        )

    def merge(self, outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over all of a row's blocks from that over each: (places, D) and (places,) to (H * R, ..)."""
        table = self._by_row(lses[self.bag])
        lse = table.logsumexp(-1)
        weights = (table - lse[:, None]).exp()
        weights = weights.flatten() if self._even else weights[self._slots]
        return F.embedding_bag(self.bag, outs, self.offsets, mode="sum", per_sample_weights=weights), lse

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """(places, D) summed by row: (H * R, D)."""
        return F.embedding_bag(self.bag, values, self.offsets, mode="sum")

    @property
    def _even(self) -> bool:
        return len(self.bag) == self.most * len(self.offsets)

    @property
    def _slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and slot of each entry of `bag`."""
        number = torch.arange(len(self.bag), device=self.bag.device)
        row = torch.searchsorted(self.offsets, number, right=True) - 1
        return row, number - self.offsets[row]

    def _by_row(self, values: torch.Tensor) -> torch.Tensor:
        """(H * R, most): one line a row, -inf behind its pairs."""
        if self._even:
            return values.view(-1, self.most)
        return values.new_full((len(self.offsets), self.most), float("-inf")).index_put_(self._slots, values)


def _chunks(
    number: torch.Tensor, counts: list[int], rows: torch.Tensor, heads: int, parts: int, sizes: torch.Tensor
) -> tuple[list[Chunk], torch.Tensor, int]:
    """Visits of about as many queries together; the place of each pair's result; how many places there are."""
    ends = number.cumsum(0)
    position = torch.empty_like(rows)
    chunks = []
    at = 0
    for some in _alike(counts, heads, parts, sizes.tolist()):
        longest = counts[some[0]]
        visit = torch.tensor(some, device=rows.device)
        step = torch.arange(longest, device=rows.device)
        beyond = step >= number[visit][:, None]
        pair = (ends - number)[visit][:, None] + torch.minimum(step, number[visit][:, None] - 1)
        place = at + torch.arange(pair.numel(), device=rows.device).view_as(pair)
        even = counts[some[-1]] == longest
        position[pair if even else pair[~beyond]] = place if even else place[~beyond]
        blocks, rest = torch.div(visit, heads * parts, rounding_mode="floor"), visit % (heads * parts)
        own = parts == 2 and some[0] % 2 == 0
        head = torch.div(rest, parts, rounding_mode="floor")
        chunks.append(Chunk(slice(at, at + pair.numel()), rows[pair], None if even else beyond, head, blocks, own))
        at += pair.numel()
    return chunks, position, at


def _alike(counts: list[int], heads: int, parts: int, sizes: list[int]) -> Iterator[list[int]]:
    """Numbers of visits that go together: of as many keys, own or not, longest first, of a chunk's rows at most."""
    groups: dict[tuple[int, int], list[int]] = {}
    for visit, count in enumerate(counts):
        if count:
            key = sizes[visit // (heads * parts)], visit % parts
            groups.setdefault(key, []).append(visit)
    for visits in groups.values():
        visits.sort(key=lambda visit: -counts[visit])
        while visits:
            take = max(1, CHUNK_ROWS // counts[visits[0]])
            yield visits[:take]
            visits = visits[take:]
