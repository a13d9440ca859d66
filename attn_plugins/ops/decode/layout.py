"""Where caches of different lengths stand in one tensor: whole tiles of all heads first, then what is left of each.

A CPU reads a packed cache as rows of equally long tiles, one call for all heads (tiling.py). Where in memory tiles
begin makes no difference, but in a cache packed head by head they do not end where heads do, and what they leave of
each has to be copied. So each head's tokens are parted: a first area is nothing but whole tiles of `LONG` tokens, a
second one holds the rests, which are whole tiles of 64 if caches are whole blocks. Nothing is padded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

LONG = 512  # tokens: of longer tiles more would be left over, of shorter ones a key costs more


@dataclass(frozen=True)
class Layout:
    """Of one cache per head.

    lengths: tokens of each head. mains: how many of them stand in the first area. starts, rests: where a head's tokens
    begin there, and in the second area, which has the others.
    """

    lengths: tuple[int, ...]
    mains: tuple[int, ...]
    starts: tuple[int, ...]
    rests: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Layout:
        """Caches of one length, or without a whole tile, stand one behind another, each in one piece."""
        mains = [length // LONG * LONG for length in lengths]
        if len(set(lengths)) == 1 or not any(mains):
            mains = list(lengths)
        others = [length - main for length, main in zip(lengths, mains, strict=True)]
        ends = list(itertools.accumulate([*mains, *others]))
        starts = (0, *ends[:-1])
        return cls(tuple(lengths), tuple(mains), tuple(starts[: len(mains)]), tuple(starts[len(mains) :]))

    @property
    def total(self) -> int:
        """Tokens of all heads."""
        return sum(self.lengths)

    @property
    def parted(self) -> bool:
        return self.mains != self.lengths

    def slot(self, head: int, n: int) -> int:
        """Where a head's n-th token stands."""
        main = self.mains[head]
        return self.starts[head] + n if n < main else self.rests[head] + n - main

    def ranges(self, most: int | None = None) -> list[list[tuple[int, int]]]:
        """(heads, 1 or 2, 2): the first `most` tokens of every head, or all, as [start, end) in each area."""
        found = []
        for length, main, start, rest in zip(self.lengths, self.mains, self.starts, self.rests, strict=True):
            held = length if most is None else min(length, most)
            pair = (start, start + min(held, main)), (rest, rest + max(held - main, 0))
            found.append(list(pair if self.parted else pair[:1]))
        return found
