"""VMoBA: mixture of block attention for video (arXiv 2506.23858).

The keys of the grid are cut into blocks, in turn from layer to layer: `l mod 3 = 0` in time, `1` in space, `2` in both,
over the global layer index `l`. A query `q` sees the blocks `j` of the best scores `<mean of the keys in j, q>`, always
its own, and all text. The published form chooses for every query; here a tile of neighbouring queries chooses together
by default, which is what a kernel can use; `exact=True` is the published form.

Other deviations: blocks need not divide the grid, the choice is within one batch item, tau of 1 is dense attention.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from attn_plugins.method import Method, MethodConfig, Processor, SiteKind
from attn_plugins.methods.block_choice import BlockChoiceProcessor, block_count, check_share, share_of_blocks
from attn_plugins.ops.vmoba.selection import Selection


@dataclass(frozen=True)
class VMoBAConfig(MethodConfig):
    """Which blocks, and how many of them.

    Args:
        blocks: the 1-D, 2-D and 3-D block, each (T, H, W): tokens, -1 for the whole axis, or a share of it (0.25).
        recurrence: which of them the layers have, in turn.
        rule: "topk", "threshold" (min-max normalised scores, as published) or "top_p" (their softmax).
        scope: "query", or "head" (the paper's "global", within one batch item).
        k_blocks: blocks kept by "topk", the own one counted: a number, a share of the blocks as a float, or three of
            either, for the 1-D, 2-D and 3-D block.
        tau: share of the scores' total that "threshold" and "top_p" keep; 1 keeps all.
        exact: choose for every query, as published; slower.
        tile: tokens of the query tiles that choose together: a number, or None (1536, within their block).
        min_blocks, max_blocks: bounds on the blocks of a query; None is no bound.
        base_size: the token grid that the blocks are for; on another grid they are scaled.
        backend: of the operator.
    """

    blocks: Any = ((0.125, -1, -1), (-1, 0.2, 0.25), (0.34, 0.2, 0.25))
    recurrence: tuple[int, ...] = (1, 2, 3)
    rule: str = "topk"
    scope: str = "query"
    k_blocks: Any = 0.25
    tau: float = 0.25
    exact: bool = False
    tile: int | None = None
    min_blocks: int = 1
    max_blocks: int | None = None
    base_size: tuple[int, ...] | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        rows = self.blocks
        if not (isinstance(rows, tuple) and len(rows) == 3 and all(isinstance(r, tuple) and len(r) == 3 for r in rows)):
            raise ValueError(f"blocks={rows!r}: give three blocks (1-D, 2-D, 3-D) of three sizes each (T, H, W)")
        for size in (size for row in rows for size in row):
            share = isinstance(size, float) and 0 < size <= 1
            if isinstance(size, bool) or not (share or (isinstance(size, int) and (size == -1 or size >= 1))):
                raise ValueError(f"blocks: {size!r}: give 1 or more tokens, -1 (the whole axis) or a share in (0, 1]")
        if not self.recurrence or any(dimension not in (1, 2, 3) for dimension in self.recurrence):
            raise ValueError(f"recurrence={self.recurrence!r}: give one or more of 1, 2 and 3")
        if isinstance(self.k_blocks, tuple) and len(self.k_blocks) != 3:
            raise ValueError(f"k_blocks={self.k_blocks!r}: give one, or three for the 1-D, 2-D and 3-D block")
        for value in self.k_blocks if isinstance(self.k_blocks, tuple) else (self.k_blocks,):
            check_share("k_blocks", value)
        if self.tile is not None and (isinstance(self.tile, bool) or not isinstance(self.tile, int) or self.tile < 1):
            raise ValueError(f"tile={self.tile!r}: give 1 or more tokens, or None")
        if self.base_size is not None and len(self.base_size) != 3:
            raise ValueError(f"base_size={self.base_size}: give the three sizes (T, H, W)")
        for rule in (self.rule, "threshold"):  # a bad tau is an error also where no rule reads it
            Selection(rule, self.scope, 1, self.tau, self.min_blocks, self.max_blocks)

    def block(self, grid: tuple[int, ...], dimension: int) -> tuple[int, ...]:
        """The block of a dimension (1, 2 or 3) on a grid. Pictures have no time: 1-D blocks are then 2-D ones."""
        still = len(grid) == 2 or (len(grid) == 3 and grid[0] == 1)
        row = self.blocks[(2 if still and dimension == 1 else 1 if len(grid) == 1 else dimension) - 1]
        axes = {1: slice(0, 1), 2: slice(1, 3), 3: slice(0, 3)}[len(grid)]  # one axis is time's, two are (H, W)
        base = grid if self.base_size is None else self.base_size[axes]
        sizes = []
        for size, length, written in zip(row[axes], grid, base, strict=True):
            if isinstance(size, float):
                size = max(1, round(size * length))
            elif size != -1 and written != length:
                size = max(1, round(size * length / written))
            sizes.append(length if size == -1 else min(size, length))
        return tuple(sizes)


class VMoBAProcessor(BlockChoiceProcessor):
    """VMoBA at the layers of one dimension."""

    config: VMoBAConfig

    def setting(self, grid: tuple[int, ...]) -> dict[str, Any]:
        config = self.config
        (dimension,) = config.recurrence
        block = config.block(grid, dimension)
        number = config.k_blocks[dimension - 1] if isinstance(config.k_blocks, tuple) else config.k_blocks
        return {
            "block": block, "rule": config.rule, "scope": config.scope, "tau": config.tau, "exact": config.exact,
            "k_blocks": share_of_blocks(number, block_count(grid, block)), "tile": config.tile,
            "min_blocks": config.min_blocks, "max_blocks": config.max_blocks,
        }  # fmt: skip


class VMoBA(Method):
    name = "vmoba"
    title = "Mixture of block attention for video"
    kind = "sparse"
    paper = "arXiv 2506.23858"
    config_class = VMoBAConfig
    own_settings = frozenset({"blocks", "k_blocks", "tau"})

    def ladder(self, kind: SiteKind, grid: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
        return ({"k_blocks": 0.5}, {"k_blocks": 0.25})

    def processor(
        self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind = "self"
    ) -> Processor | None:
        assert isinstance(config, VMoBAConfig)  # patching makes it with config_class
        dimension = config.recurrence[layer_index % len(config.recurrence)]
        return _processor(dataclasses.replace(config, recurrence=(dimension,)))


@functools.lru_cache(maxsize=256)
def _processor(config: VMoBAConfig) -> Processor:
    """One object for equal settings: a compiled model needs a graph for each distinct one."""
    return VMoBAProcessor(config)
