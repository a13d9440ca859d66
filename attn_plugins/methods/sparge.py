"""The block selection of SpargeAttn (arXiv 2502.18137): pooled queries, pooled keys, the top of their softmax.

Blocks of queries and of keys are averaged; of the softmax of their products each block of queries keeps the fewest
blocks of keys whose sum reaches `tau`: attention is computed in those.

Deviations: no quantisation; no test of how alike the tokens of a block are (blocks that are not would always be kept);
no second, online skipping of products with small weights; blocks are boxes of the grid instead of runs of tokens, which
brings alike tokens together; a block of queries always keeps its own keys.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from attn_plugins.method import Method, MethodConfig, Processor, SiteKind
from attn_plugins.methods.block_choice import BlockChoiceProcessor
from attn_plugins.ops.vmoba.layout import fit_tile
from attn_plugins.ops.vmoba.selection import Selection


@dataclass(frozen=True)
class SpargeConfig(MethodConfig):
    """Blocks, and the share of the softmax that is kept.

    Args:
        block: tokens of a block: a number that a nearly cubic box shall not exceed.
        tau: share of the softmax's sum; 1 keeps all.
        min_blocks, max_blocks: bounds on the blocks of a block of queries; None is no bound.
        backend: of the operator.
    """

    block: int = 128
    tau: float = 0.9
    min_blocks: int = 1
    max_blocks: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"block={self.block!r}: give 1 or more tokens")
        Selection("top_p", "query", None, self.tau, self.min_blocks, self.max_blocks)


class SpargeProcessor(BlockChoiceProcessor):
    """Top-p selection of pooled blocks."""

    config: SpargeConfig

    def setting(self, grid: tuple[int, ...]) -> dict[str, Any]:
        block = fit_tile(grid, self.config.block)
        return {
            "block": block, "tile": block, "rule": "top_p", "tau": self.config.tau,
            "min_blocks": self.config.min_blocks, "max_blocks": self.config.max_blocks,
        }  # fmt: skip


class Sparge(Method):
    name = "sparge"
    title = "Top-p selection of pooled blocks, as in SpargeAttn"
    kind = "sparse"
    paper = "arXiv 2502.18137"
    config_class = SpargeConfig
    own_settings = frozenset({"block", "tau"})

    def ladder(self, kind: SiteKind, grid: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
        return ({"tau": 0.95}, {"tau": 0.8})

    def processor(
        self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind = "self"
    ) -> Processor | None:
        assert isinstance(config, SpargeConfig)  # patching makes it with config_class
        return _processor(config)


@functools.lru_cache(maxsize=64)
def _processor(config: SpargeConfig) -> Processor:
    return SpargeProcessor(config)
