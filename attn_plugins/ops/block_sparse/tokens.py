"""The tokens of a few query or KV blocks: read from a head's (N, ...) tensor, written back, or added to."""

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
        """(N, ...) to (1, rows, count, ...): a copy, or a view where the tokens are evenly spaced runs."""
        rest = t.shape[1:]
        if self.index is not None:
            return t.index_select(0, self.index).view(1, self.rows, self.count, *rest)
        strides = (0, self.step * t.stride(0), t.stride(0), *t.stride()[1:])
        return t.as_strided((1, self.rows, self.count, *rest), strides, t.storage_offset() + self.start * t.stride(0))

    def write(self, t: torch.Tensor, values: torch.Tensor) -> None:
        """Put (1, rows, count, ...) values at these (disjoint) tokens of (N, ...)."""
        if self.index is not None:
            t.index_copy_(0, self.index, values.reshape(-1, *t.shape[1:]))
        else:
            self.read(t).copy_(values)

    def add(self, t: torch.Tensor, values: torch.Tensor) -> None:
        """Add (1, rows, count, D) values to (N, D), row after row: the order of the sums is fixed."""
        if self.index is not None:
            t.index_add_(0, self.index, values.reshape(-1, *t.shape[1:]).to(t.dtype))
            return
        for row in range(self.rows):
            start = self.start + row * self.step
            t[start : start + self.count] += values[0, row]
