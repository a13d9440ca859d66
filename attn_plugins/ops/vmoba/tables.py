"""A layout as tensors on one device: uploaded once, as layouts stay from call to call."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from attn_plugins.ops.vmoba.layout import Layout
from attn_plugins.plan.pieces import upload


@dataclass(frozen=True, eq=False)
class Boxes:
    """Blocks or tiles: box `j` has the places `starts[j]` to `starts[j] + sizes[j]` of an order of tokens.

    Attributes:
        starts, sizes: (boxes,) int32; first those of the grid, then one for the real text on either side.
        order: (N,) int32, the token that stands at each place; None: tokens stand in raster order.
        grid: how many are of the grid.
        longest: tokens of the longest.
    """

    starts: torch.Tensor
    sizes: torch.Tensor
    order: torch.Tensor | None
    grid: int
    longest: int

    @property
    def count(self) -> int:
        return len(self.starts)


@functools.lru_cache(maxsize=64)
def blocks(one: Layout, device: torch.device) -> Boxes:
    _, _, starts, sizes, _, order = one.columns
    return _boxes(starts, sizes, order, one.count, device)


@functools.lru_cache(maxsize=64)
def tiles(one: Layout, device: torch.device) -> Boxes:
    starts, sizes, _, _, order, _ = one.columns
    return _boxes(starts, sizes, order, len(one.tiles.sizes), device)


@functools.lru_cache(maxsize=64)
def own_blocks(one: Layout, exact: bool, device: torch.device) -> torch.Tensor:
    """(rows,) int64: the block of each grid token in raster order (`exact`), or of each tile."""
    return upload(one.own[one.tile_of] if exact else one.own, device)


def _boxes(starts: torch.Tensor, sizes: torch.Tensor, order: torch.Tensor, grid: int, device: torch.device) -> Boxes:
    raster = torch.equal(order, torch.arange(len(order)))
    moved = None if raster else upload(order.int(), device)
    return Boxes(upload(starts, device), upload(sizes, device), moved, grid, int(sizes.max()))
