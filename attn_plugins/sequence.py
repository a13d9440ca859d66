"""What the tokens of one attention call are: ordered segments of text, a grid, text.

A family (which knows the model) describes the sequence; a method and the block plan read it. Nothing here knows either.
Padding is data of a segment (`valid` shorter than `length`), never a mask tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Valid = int | tuple[int, ...]
Kind = Literal["text", "grid"]


@dataclass(frozen=True)
class Segment:
    """A run of `length` tokens, of which the first `valid` are real (an int, or one per batch item)."""

    kind: Kind
    start: int
    length: int
    valid: Valid

    @property
    def padded(self) -> bool:
        return self.valid != self.length


@dataclass(frozen=True)
class Sequence:
    """Text before, a grid of 1 to 3 axes in raster order (last axis fastest), text after.

    Args:
        grid: token counts per axis, outermost first: (L,), (H, W) or (T, H, W).
        text_before, text_after: number of text tokens on that side of the grid.
        valid_before, valid_after: how many of them are real: an int, or a tuple with one int per batch item.
            None means all of them.

    Raises:
        ValueError: an empty or more than 3-D grid, a negative length, or `valid` outside 0..length.
    """

    grid: tuple[int, ...]
    text_before: int = 0
    text_after: int = 0
    valid_before: Valid | None = None
    valid_after: Valid | None = None

    def __post_init__(self) -> None:
        grid = (self.grid,) if isinstance(self.grid, int) else tuple(int(size) for size in self.grid)
        object.__setattr__(self, "grid", grid)
        if not 1 <= len(grid) <= 3 or min(grid) < 1:
            raise ValueError(f"grid={grid}: a grid has 1 to 3 axes of at least 1 token each, outermost axis first")
        for side in ("before", "after"):
            length, valid = getattr(self, f"text_{side}"), getattr(self, f"valid_{side}")
            if length < 0:
                raise ValueError(f"text_{side}={length}: a number of tokens is 0 or more")
            object.__setattr__(self, f"valid_{side}", _normalised_valid(f"text_{side}", length, valid))
        items = {len(v) for v in (self.valid_before, self.valid_after) if isinstance(v, tuple)}
        if len(items) > 1:
            raise ValueError(f"text_before and text_after give valid lengths for batches of {sorted(items)} items")

    @property
    def tokens(self) -> int:
        """Tokens of the grid alone."""
        return math.prod(self.grid)

    @property
    def length(self) -> int:
        """All tokens, N = text + prod(grid), padding included."""
        return self.text_before + self.tokens + self.text_after

    @property
    def batch(self) -> int | None:
        """The batch size that per-item valid lengths ask for; None where every item is alike."""
        for valid in (self.valid_before, self.valid_after):
            if isinstance(valid, tuple):
                return len(valid)
        return None

    @property
    def padded(self) -> bool:
        return self.valid_before != self.text_before or self.valid_after != self.text_after

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments in order, empty ones left out."""
        assert self.valid_before is not None and self.valid_after is not None  # set by __post_init__
        rows = (
            Segment("text", 0, self.text_before, self.valid_before),
            Segment("grid", self.text_before, self.tokens, self.tokens),
            Segment("text", self.text_before + self.tokens, self.text_after, self.valid_after),
        )
        return tuple(segment for segment in rows if segment.length)

    def item(self, index: int) -> Sequence:
        """The sequence of one batch item: the same, with plain ints for its valid lengths."""

        def pick(valid: Valid | None) -> Valid | None:
            return valid[index] if isinstance(valid, tuple) else valid

        return Sequence(self.grid, self.text_before, self.text_after, pick(self.valid_before), pick(self.valid_after))

    def without_padding(self, length: int) -> Sequence | None:
        """The sequence of an item whose padding was cut off, if that leaves an item of `length` tokens."""
        for index in range(self.batch or 1):
            one = self.item(index)
            assert isinstance(one.valid_before, int) and isinstance(one.valid_after, int)  # an item's are
            if one.valid_before + one.tokens + one.valid_after == length:
                return Sequence(one.grid, one.valid_before, one.valid_after)
        return None


def _normalised_valid(name: str, length: int, valid: Valid | None) -> Valid:
    """All-equal tuples become one int, so that equal sequences are equal (they key the plan cache)."""
    if valid is None:
        return length
    values = valid if isinstance(valid, tuple) else (valid,)
    bad = [v for v in values if not 0 <= v <= length]
    if bad or not values:
        raise ValueError(f"{name}: {bad or 'no'} valid tokens of {length}; each must lie in 0..{length}")
    return values[0] if len(set(values)) == 1 else tuple(int(v) for v in values)


def text_lengths(name: str, value: Any) -> tuple[int, Valid | None]:
    """(length, valid) of a text argument: an int, or (B, 2) rows of [length, valid], as a tensor or nested lists.

    Raises:
        ValueError: rows that are not pairs, or whose lengths differ (a batch is rectangular).
    """
    if isinstance(value, int):
        return value, None
    rows = value.tolist() if hasattr(value, "tolist") else [list(row) for row in value]
    if not rows or not all(isinstance(row, list) and len(row) == 2 for row in rows):
        raise ValueError(f"{name}={value}: give a length, or one [length, valid] pair per batch item, shape (B, 2)")
    if len({row[0] for row in rows}) > 1:
        raise ValueError(
            f"{name}: lengths {[row[0] for row in rows]} differ; a batch has one length, padding is `valid`"
        )
    return int(rows[0][0]), tuple(int(row[1]) for row in rows)
