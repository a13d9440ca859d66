"""Where the prompts would be without masks: the shares of the attention to text, as means over layers and steps."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F

from attn_plugins.sequence import Sequence


class RegionMaps:
    """Collects, of all layers of a patch that see the text, which prompt a token would attend to; outputs stay.

        with RegionMaps(handle) as maps:
            pipe(...)
        maps.mean()     # (B, R, H, W), of a video (B, R, T, H, W)

    B are the batch items that the regions are for. A token's shares over the regions and the pipeline's own prompt add
    up to 1; they are those of one softmax over all prompts, whatever the masks are. Beside the masks they say whether
    the model keeps the subjects apart by itself (metrics/confusion.py). A compiled model must run eagerly inside.

    Args:
        handle: what `attn_plugins.patch(pipe, "regions", ...)` returned.
        graph: keep the autograd graph, for a loss on the maps (`metrics.dice_loss`).

    Raises:
        ValueError: a patch of another method.
    """

    def __init__(self, handle: Any, graph: bool = False) -> None:
        if handle.method != "regions":
            raise ValueError(f"these maps are of patches by 'regions', not {handle.method!r}")
        self.layers = [layer for patched in handle.patches for layer in patched.layers if layer.kind != "self"]
        self.graph = graph
        self.sums: dict[tuple[int, ...], torch.Tensor] = {}
        self.counts: dict[tuple[int, ...], int] = {}

    def take(self, shares: torch.Tensor, sequence: Sequence | None) -> None:
        """One layer's shares (B, R, tokens of the grid), by the processor."""
        if sequence is None:
            return
        grid = sequence.grid
        maps = (shares if self.graph else shares.detach()).unflatten(2, grid)
        before = self.sums.get(grid)
        if before is not None and before.shape != maps.shape:
            raise ValueError(f"the batch changed from {len(before)} to {len(maps)}: collect the maps of each by itself")
        self.sums[grid] = maps if before is None else before + maps
        self.counts[grid] = self.counts.get(grid, 0) + 1

    def mean(self, size: tuple[int, ...] | None = None) -> torch.Tensor:
        """(B, R, *size) in float32: the mean over layers and steps, brought to `size`; None: of the finest layer.

        Raises:
            ValueError: no layer has run inside the block.
        """
        if not self.sums:
            raise ValueError("no layer has seen the regions' prompts inside the block: run the pipeline in it")
        size = tuple(size or max(self.sums, key=lambda grid: grid[-1] * grid[-2]))
        if len(size) == 3:
            parts = [F.interpolate(total.float(), size=size, mode="trilinear") for total in self.sums.values()]
        else:
            parts = [
                F.interpolate(total.float(), size=size, mode="bilinear", antialias=True) for total in self.sums.values()
            ]
        return torch.stack(parts).sum(0) / sum(self.counts.values())

    def __enter__(self) -> RegionMaps:
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
