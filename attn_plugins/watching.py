"""Collecting what the layers of a patch tell while a model runs: maps over the grid, as means over layers and steps."""

from __future__ import annotations

from types import TracebackType
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F

from attn_plugins.sequence import Sequence

Watching = TypeVar("Watching", bound="LayerWatch")


class LayerWatch:
    """Who is told by some layers (`Layer.watch`) inside a block; a subclass has `take`, which processors call."""

    layers: list[Any]

    def __enter__(self: Watching) -> Watching:
        if any(layer.watch is not None for layer in self.layers):
            raise ValueError("maps of this patch are being collected already")
        for layer in self.layers:
            layer.watch = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self.layers:
            layer.watch = None


class GridMaps(LayerWatch):
    """Sums of maps (B, R, tokens) of layers, those of one grid together, so that one map a grid is held.

    graph: keep the autograd graph, for a loss on the maps.
    """

    nothing: ClassVar[str] = "nothing has run inside the block"  # what `mean` says then

    def __init__(self, layers: list[Any], graph: bool = False) -> None:
        self.layers = layers
        self.graph = graph
        self.sums: dict[tuple[int, ...], torch.Tensor] = {}
        self.counts: dict[tuple[int, ...], int] = {}

    def take(self, weights: torch.Tensor, sequence: Sequence | None) -> None:
        """One layer's (B, R, S), of the tokens of the grid and of what is behind them, which is left out."""
        if sequence is None:
            return
        grid = sequence.grid
        maps = (weights if self.graph else weights.detach())[..., : sequence.tokens].unflatten(2, grid)
        before = self.sums.get(grid)
        if before is not None and before.shape != maps.shape:
            raise ValueError(f"the batch changed from {len(before)} to {len(maps)}: collect the maps of each by itself")
        self.sums[grid] = maps.clone() if before is None else before + maps
        self.counts[grid] = self.counts.get(grid, 0) + 1

    def mean(self, size: tuple[int, ...] | None = None) -> torch.Tensor:
        """(B, R, *size) in float32: the mean over layers and steps, brought to `size` (in pixels, say).

        None: of the finest layer. Under guidance B's second half is that of the prompts.

        Raises:
            ValueError: no layer has run inside the block.
        """
        if not self.sums:
            raise ValueError(self.nothing)
        size = tuple(size or max(self.sums, key=lambda grid: grid[-1] * grid[-2]))
        how: dict[str, Any] = {"mode": "trilinear"} if len(size) == 3 else {"mode": "bilinear", "antialias": True}
        parts = [F.interpolate(total.float(), size=size, **how) for total in self.sums.values()]
        return torch.stack(parts).sum(0) / sum(self.counts.values())
