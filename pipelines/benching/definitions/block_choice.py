"""VMoBA's choice of blocks (arXiv 2506.23858) for one head, in float64: what the check goes by.

Nothing here comes from the library, so that a fault in it cannot hide.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockChoice:
    """`k_blocks` best blocks of each row; or of all pairs of rows and blocks the best, up to a share `tau`.

    A row is a token, or the mean of a `tile` of them that lies within a block.
    """

    grid: tuple[int, ...]
    block: tuple[int, ...]
    tile: tuple[int, ...] | None
    k_blocks: int | None = None
    tau: float = 0.0

    def boxes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(N,) int64 each: the block and the row of each token, in raster order."""
        blocks, rows = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        for size, block, tile in itertools.zip_longest(self.grid, self.block, self.tile or (), fillvalue=1):
            at = torch.arange(size)
            inner = -(-block // tile)
            row = at // block * inner + at % block // tile
            blocks = (blocks[:, None] * -(-size // block) + at // block).flatten()
            rows = (rows[:, None] * -(-size // block) * inner + row).flatten()
        return blocks, torch.unique(rows, return_inverse=True)[1]

    def __call__(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """q and k (N, D) to (N, blocks) bool."""
        block_of, row_of = (t.to(q.device) for t in self.boxes())
        scores = _means(q, row_of) @ _means(k, block_of).T
        own = torch.zeros_like(scores, dtype=torch.bool)
        own[row_of, block_of] = True
        if self.k_blocks is not None:
            best = scores.masked_fill(own, float("inf")).topk(min(self.k_blocks, scores.shape[1]), dim=-1).indices
            return torch.zeros_like(own).scatter_(-1, best, True)[row_of]
        weights = (scores - scores.min()) / (scores.max() - scores.min())
        ranked = torch.sort(weights.masked_fill(own, -1.0).flatten(), descending=True)
        reached = weights[own].sum() + ranked.values.clamp(min=0).cumsum(0) - ranked.values.clamp(min=0)
        needed = (reached < self.tau * weights.sum()) & (ranked.values >= 0)
        others = torch.zeros_like(needed).scatter_(0, ranked.indices, needed)
        return (own | others.view_as(own))[row_of]


def _means(t: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    groups = int(group.max()) + 1
    sums = torch.zeros(groups, t.shape[1], dtype=torch.float64, device=t.device).index_add_(0, group, t.double())
    return sums / torch.bincount(group, minlength=groups)[:, None]
