"""DraftAttention (arXiv 2505.14708): a low-resolution attention map chooses the blocks.

Queries and keys are averaged over 8 x 16 tokens of a frame; of the map of their products the highest share is kept for
each head, and attention is computed in those blocks.

Deviations: a tile always keeps its own block; tiles at the edge of a frame are shorter, not padded; the share is of
all tiles' blocks together, or, with `scope="query"`, of each tile's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from attn_plugins.method import Method, MethodConfig, Processor, SiteKind
from attn_plugins.methods.block_choice import BlockChoiceProcessor, block_count, check_share, share_of_blocks


@dataclass(frozen=True)
class DraftConfig(MethodConfig):
    """The resolution of the draft and the share of it that is kept.

    Args:
        pool: tokens of a frame that are averaged, (H, W).
        keep: share of the map that is kept, as a float, or blocks a tile keeps on average (an int).
        scope: "head": the share is of a head's whole map; "query": of each tile's row.
        max_blocks: the most blocks of a tile; None is no bound.
        backend: of the operator.
    """

    pool: tuple[int, ...] = (8, 16)
    keep: Any = 0.25
    scope: str = "head"
    max_blocks: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not (isinstance(self.pool, tuple) and len(self.pool) == 2 and min(self.pool) >= 1):
            raise ValueError(f"pool={self.pool!r}: give two sizes (H, W) of 1 token or more")
        check_share("keep", self.keep)
        if self.scope not in ("head", "query"):
            raise ValueError(f'scope={self.scope!r}: legal are "head" and "query"')
        if self.max_blocks is not None and self.max_blocks < 1:
            raise ValueError(f"max_blocks={self.max_blocks}: give 1 or more, or None")


class DraftProcessor(BlockChoiceProcessor):
    """DraftAttention."""

    config: DraftConfig

    def setting(self, grid: tuple[int, ...]) -> dict[str, Any]:
        pool = self.config.pool
        block = (1, *pool) if len(grid) == 3 else pool if len(grid) == 2 else (pool[0] * pool[1],)
        return {
            "block": block, "tile": tuple(block), "rule": "topk", "scope": self.config.scope,
            "k_blocks": share_of_blocks(self.config.keep, block_count(grid, block)),
            "max_blocks": self.config.max_blocks,
        }  # fmt: skip


class Draft(Method):
    name = "draft"
    title = "DraftAttention: blocks from a low-resolution map"
    kind = "sparse"
    paper = "arXiv 2505.14708"
    config_class = DraftConfig
    own_settings = frozenset({"pool", "keep"})

    def ladder(self, kind: SiteKind, grid: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
        return ({"keep": 0.5}, {"keep": 0.25})

    def processor(
        self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind = "self"
    ) -> Processor | None:
        assert isinstance(config, DraftConfig)  # patching makes it with config_class
        return _processor(config)


@functools.lru_cache(maxsize=64)
def _processor(config: DraftConfig) -> Processor:
    return DraftProcessor(config)
