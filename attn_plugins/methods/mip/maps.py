"""Who was put where: the weights of the references over the picture, as means over layers and steps."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F

from attn_plugins.sequence import Sequence


class ReferenceMaps:
    """Collects the weights of all layers of a patch inside a block; outputs stay as they are.

        with ReferenceMaps(handle) as maps:
            pipe(...)
        maps.mean()     # (B, R, H, W)

    Layers of one grid are added up as they come, so it holds one map a grid. Layers whose scale is 0 merge nothing and
    are not counted. A compiled model must run eagerly inside the block, or have been compiled in it.
    """

    def __init__(self, handle: Any) -> None:
        """handle: what `attn_plugins.patch(pipe, "mip", ...)` returned.

        Raises:
            ValueError: a patch of another method.
        """
        self.layers = [layer for patched in handle.patches for layer in patched.layers]
        if handle.method != "mip":
            raise ValueError(f"maps are of patches by 'mip', not {handle.method!r}")
        self.phrases: tuple[str, ...] = self.layers[0].processor.phrases
        self.sums: dict[tuple[int, ...], torch.Tensor] = {}
        self.counts: dict[tuple[int, ...], int] = {}

    def take(self, weights: torch.Tensor, sequence: Sequence | None) -> None:
        """One layer's weights (B, R, S), by the processor."""
        if sequence is None:
            return
        maps = weights.detach().unflatten(2, sequence.grid)
        before = self.sums.get(sequence.grid)
        if before is not None and before.shape != maps.shape:
            raise ValueError(f"the batch changed from {len(before)} to {len(maps)}: collect the maps of each by itself")
        self.sums[sequence.grid] = maps.clone() if before is None else before + maps
        self.counts[sequence.grid] = self.counts.get(sequence.grid, 0) + 1

    def mean(self, size: tuple[int, int] | None = None) -> torch.Tensor:
        """(B, R, height, width) in float32: the mean over layers and steps. Under guidance B's second half is that of
        the prompts. `size`: in pixels, say; None: of the finest layer.

        Raises:
            ValueError: no layer has run inside the block.
        """
        if not self.sums:
            raise ValueError("no reference was merged inside the block: run the pipeline in it, with a scale above 0")
        size = size or max(self.sums, key=lambda grid: grid[0] * grid[1])  # type: ignore[assignment]
        parts = [
            F.interpolate(total.float(), size=size, mode="bilinear", antialias=True) for total in self.sums.values()
        ]
        return torch.stack(parts).sum(0) / sum(self.counts.values())

    def __enter__(self) -> ReferenceMaps:
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
