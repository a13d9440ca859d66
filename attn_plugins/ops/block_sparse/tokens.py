"""The tokens of a few query or KV blocks: read from some heads' (H, N, ...) tensor, written back, or added to."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tokens:
    """`rows` lists of `count` tokens each.

    Either an `index` (rows * count,), or, where row `r` is the run that begins at `start + r * step`, no index at all:
    such rows are read as a view. Query blocks are disjoint; lists of keys may overlap.
    """

    rows: int
    count: int
    index: torch.Tensor | None = None
    start: int = 0
    step: int = 0

    @classmethod
    def of(cls, tokens: torch.Tensor) -> Tokens:
        """From token numbers (rows, count) on the host."""
        rows, count = tokens.shape
        start = int(tokens[0, 0])
        step = int(tokens[1, 0]) - start if rows > 1 else count
        runs = start + step * torch.arange(rows)[:, None] + torch.arange(count)
        if step >= 0 and bool((tokens == runs).all()):
            return cls(rows, count, None, start, step)
        return cls(rows, count, tokens.reshape(-1))

    def to(self, device: torch.device) -> Tokens:
        index = None if self.index is None else self.index.to(device)
        return Tokens(self.rows, self.count, index, self.start, self.step)

    def read(self, t: torch.Tensor) -> torch.Tensor:
        """(H, N, ...) to (H, rows, count, ...): a copy, or a view where the tokens are evenly spaced runs."""
        if self.index is None:
            strides = (t.stride(0), self.step * t.stride(1), *t.stride()[1:])
            shape = (t.shape[0], self.rows, self.count, *t.shape[2:])
            return t.as_strided(shape, strides, t.storage_offset() + self.start * t.stride(1))
        if _heads_inside(t):  # a token's heads lie side by side: one long row
            return t.transpose(0, 1).index_select(0, self.index).transpose(0, 1).unflatten(1, (self.rows, self.count))
        gathered = t.new_empty(t.shape[0], len(self.index), *t.shape[2:])
        for head, into in zip(t, gathered, strict=True):  # all at once, along dim 1, takes nearly twice the time
            torch.index_select(head, 0, self.index, out=into)
        return gathered.unflatten(1, (self.rows, self.count))

    def write(self, t: torch.Tensor, values: torch.Tensor) -> None:
        """Put (H, rows, count, ...) values at these (disjoint) tokens of (H, N, ...)."""
        if self.index is None:
            self.read(t).copy_(values)
        elif _heads_inside(t):
            t.transpose(0, 1).index_copy_(0, self.index, values.flatten(1, 2).transpose(0, 1))
        else:
            t.index_copy_(1, self.index, values.flatten(1, 2))

    def add(self, t: torch.Tensor, values: torch.Tensor) -> None:
        """Add (H, rows, count, D) values to (H, N, D), row after row: the order of the sums is fixed."""
        if self.index is None:
            for row in range(self.rows):
                start = self.start + row * self.step
                t[:, start : start + self.count] += values[:, row]
        elif _heads_inside(t):
            t.transpose(0, 1).index_add_(0, self.index, values.flatten(1, 2).transpose(0, 1).to(t.dtype))
        else:
            t.index_add_(1, self.index, values.flatten(1, 2).to(t.dtype))


def _heads_inside(t: torch.Tensor) -> bool:
    return t.stride(0) < t.stride(1)
