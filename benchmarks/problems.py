"""The neighborhood-attention problems that are measured, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A grid and a setting. `kind`: aligned (window and tiles meet), stride1, or dense (near or above break-even)."""

    kind: str
    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def flop_density(self) -> float:
        """Keys in the window over all keys: what an implementation without any block could reach."""
        return math.prod(k / x for k, x in zip(self.window, self.grid, strict=True))


PROBLEMS = (
    Problem("aligned", (4096,), (512,), (512,)),
    Problem("aligned", (8192,), (1024,), (1024,)),
    Problem("aligned", (64, 64), (32, 32), (16, 16)),
    Problem("aligned", (128, 128), (64, 32), (32, 32)),
    Problem("aligned", (16, 16, 16), (8, 8, 8), (8, 8, 8)),
    Problem("aligned", (16, 32, 32), (8, 16, 16), (8, 8, 8)),
    Problem("aligned", (16, 32, 32), (16, 16, 16), (16, 8, 8)),
    Problem("aligned", (32, 32, 32), (16, 16, 16), (16, 8, 8)),
    Problem("stride1", (8192,), (1024,), (1,)),
    Problem("stride1", (32768,), (2048,), (1,)),
    Problem("stride1", (64, 64), (16, 16), (1, 1)),
    Problem("stride1", (128, 128), (32, 32), (1, 1)),
    Problem("stride1", (16, 16, 16), (8, 8, 8), (1, 1, 1)),
    Problem("stride1", (16, 32, 32), (8, 16, 16), (1, 1, 1)),
    Problem("dense", (8, 32, 32), (8, 32, 30), (1, 1, 1)),
    Problem("dense", (8, 32, 32), (8, 32, 32), (8, 8, 8)),
)
QUICK = tuple(problem for problem in PROBLEMS if problem.tokens <= 8192)
