"""Heads and tokens of a tensor as rows of one matrix: what belongs to different heads is then gathered in one call."""

from __future__ import annotations

import torch


class Flat:
    """(H, N, D) as (H * N, D), without a copy where heads or tokens follow each other in memory.

    The row of token `n` of head `h` is `h * head + n * token`.
    """

    def __init__(self, t: torch.Tensor) -> None:
        self.heads, tokens, size = t.shape
        if t.transpose(0, 1).is_contiguous():
            self.rows, self.head, self.token = t.transpose(0, 1).reshape(-1, size), 1, self.heads
        else:
            self.rows, self.head, self.token = t.contiguous().view(-1, size), tokens, 1

    def index(self, heads: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(R, E): row numbers of tokens (R, E) of heads (R, 1)."""
        return heads * self.head + tokens * self.token

    def read(self, index: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """The rows of `index` (R, E) as (1, R, E, D), in the room of `into` where it is given."""
        if into is not None:
            into = into[: index.numel()]
            torch.index_select(self.rows, 0, index.flatten(), out=into)
        else:
            into = self.rows.index_select(0, index.flatten())
        return into.view(1, *index.shape, -1)

    def write(self, index: torch.Tensor, values: torch.Tensor) -> None:
        """Puts (1, R, E, D), or (1, R, E) where D is 1, there; only of a tensor that needed no copy."""
        self.rows.index_copy_(0, index.flatten(), values.reshape(-1, self.rows.shape[1]))
