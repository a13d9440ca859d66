"""Which keys a query row sees inside the blocks of a plan that are not seen whole."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from attn_plugins.plan.partition import AxisVisits
from attn_plugins.plan.windows import Ints

if TYPE_CHECKING:
    from attn_plugins.plan.block_plan import BlockPlan


class MaskRule(Protocol):
    """The mask of one query block, made when it is needed and never for the whole sequence."""

    def pattern(self, row: int, item: int, head: int) -> Hashable:
        """Query blocks with equal patterns have equal masks."""

    def keys(self, plan: BlockPlan, rows: torch.Tensor, item: int, head: int) -> torch.Tensor:
        """(R, E) int64: the keys of query blocks of one pattern, in the order that `mask` follows."""

    def mask(self, plan: BlockPlan, row: int, item: int, head: int) -> torch.Tensor:
        """(T, E) bool, True where the query may see the key."""

    def row(self, plan: BlockPlan, row: int, item: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (E,) and mask (T, E) of one query block."""

    @property
    def empty_rows(self) -> bool:
        """Whether a query may see no key at all in the blocks it visits."""


class _Rule:
    def row(self, plan: BlockPlan, row: int, item: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self.keys(plan, torch.tensor([row]), item, head)[0]  # type: ignore[attr-defined]
        return keys, self.mask(plan, row, item, head)  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class BitRule(_Rule):
    """A dense bool mask (B or 1, H or 1, N, N_kv), read tile by tile. For `BlockPlan.from_mask`."""

    bits: torch.Tensor
    empty_rows: bool = True

    def pattern(self, row: int, item: int, head: int) -> Hashable:
        return row

    def keys(self, plan: BlockPlan, rows: torch.Tensor, item: int, head: int) -> torch.Tensor:
        return plan.kv_tokens(rows, item, head)

    def mask(self, plan: BlockPlan, row: int, item: int, head: int) -> torch.Tensor:
        one = torch.tensor([row])
        return self.bits[item, head][plan.q_tokens(one)[0][:, None], plan.kv_tokens(one, item, head)[0][None]]


@dataclass(frozen=True, eq=False)
class WindowRule(_Rule):
    """Row intervals per axis, for query blocks that are tiles of a grid and see a box of keys, after `text` keys.

    The mask of a tile is the outer product of its axes' masks, and an axis has few distinct ones; so it is made by
    broadcasting, once for all tiles of a pattern.
    """

    axes: tuple[AxisVisits, ...]
    tiles: tuple[Ints, ...]  # per axis, the axis tile of each query block
    grid_start: int
    text: torch.Tensor  # (text keys,) int64
    empty_rows: bool = False

    def pattern(self, row: int, item: int, head: int) -> Hashable:
        return tuple(int(axis.masks[1][tile[row]]) for axis, tile in zip(self.axes, self.tiles, strict=True))

    def keys(self, plan: BlockPlan, rows: torch.Tensor, item: int, head: int) -> torch.Tensor:
        box = torch.full((len(rows), 1), self.grid_start)
        stride = int(np.prod([axis.window.size for axis in self.axes]))
        for axis, tile in zip(self.axes, self.tiles, strict=True):
            stride //= axis.window.size
            g = tile[rows.numpy()]
            length = int(axis.key_hi[g[0]] - axis.key_lo[g[0]])
            index = torch.from_numpy(axis.key_lo[g])[:, None] + torch.arange(length)
            coordinate = index * axis.window.dilation + torch.from_numpy(axis.q.residue[g])[:, None]
            box = (box[:, :, None] + coordinate[:, None] * stride).flatten(1)
        return torch.cat([self.text.expand(len(rows), -1), box], dim=1)

    def mask(self, plan: BlockPlan, row: int, item: int, head: int) -> torch.Tensor:
        seen = torch.ones(1, 1, dtype=torch.bool)
        for axis, tile in zip(self.axes, self.tiles, strict=True):
            masks, which = axis.masks
            one = torch.from_numpy(masks[which[tile[row]]])
            seen = (seen[:, None, :, None] & one[None, :, None, :]).flatten(2).flatten(0, 1)
        text = torch.ones(seen.shape[0], len(self.text), dtype=torch.bool)
        return torch.cat([text, seen], dim=1)
