"""The window rule in arithmetic alone: what flex attention compiles, and what the check goes by.

Nothing here comes from the library's tables, so that a fault in them cannot hide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WindowRule:
    """Not causal, not dilated; `text` tokens after the grid see everything and are seen by all."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    text: int = 0

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def length(self) -> int:
        return self.tokens + self.text

    @property
    def share(self) -> float:
        """Pairs that the mask allows over all pairs."""
        pairs = self.tokens * (math.prod(self.window) + self.text) + self.text * self.length
        return pairs / self.length**2

    def seen(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Of raster tokens, broadcast against each other: may the query see the key?"""
        allowed = (query >= 0) & (key >= 0)  # all; as a tensor, which a mask function must return
        rest = self.tokens
        for size, window, stride in zip(self.grid, self.window, self.stride, strict=True):
            rest //= size
            if window == size:
                continue
            row, column = query // rest % size, key // rest % size
            start = (row // stride * stride + (stride // 2 - window // 2)).clamp(0, size - window)
            allowed = allowed & (column >= start) & (column < start + window)
        if self.text:
            allowed = allowed | (query >= self.tokens) | (key >= self.tokens)
        return allowed

    def mask_rows(self, heads: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(1, R, N) bool, alike for all heads."""
        return self.seen(rows[:, None], torch.arange(self.length, device=rows.device)[None])[None]
