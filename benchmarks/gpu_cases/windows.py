"""Neighborhood attention on the published video and image grids (arXiv 2504.16922, and our Wan presets), as data."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from attn_plugins.ops import neighborhood_attention
from attn_plugins.pipelines.benching.backends import natten
from attn_plugins.pipelines.benching.backends.dense import dense_sides
from attn_plugins.pipelines.benching.definitions.window_rule import WindowRule
from attn_plugins.pipelines.benching.masks.grids import best_order, flex_windows, tile_order, visited
from attn_plugins.pipelines.benching.oracle import SampledAttention
from attn_plugins.pipelines.benching.sides import Built, Prepared, Setting, Side
from benchmarks.gpu_suite.case import Case, random_qkv, times


@dataclass(frozen=True, kw_only=True)
class WindowCase(Case):
    """Windows on a grid, with `text` tokens after it."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    text: int = 0

    @property
    def rule(self) -> WindowRule:
        return WindowRule(self.grid, self.window, self.stride, self.text)

    @property
    def shape(self) -> str:
        return times(self.grid) + (f" + {self.text}" if self.text else "")

    @property
    def option(self) -> str:
        return f"window {times(self.window)} stride {times(self.stride)}"

    def shrunk(self) -> WindowCase:
        side = {1: 300, 2: 16, 3: 7}[len(self.grid)]
        grid = tuple(min(size, side) for size in self.grid)
        window = tuple(max(1, k * g // size) for k, g, size in zip(self.window, grid, self.grid, strict=True))
        stride = tuple(min(s, k) for s, k in zip(self.stride, window, strict=True))
        small = WindowRule(grid, window, stride, min(self.text, 5))
        return replace(
            self,
            grid=grid,
            window=window,
            stride=stride,
            text=small.text,
            tokens=small.length,
            heads=2,
            head_dims=(16,),
        )

    def prepare(self, setting: Setting) -> Prepared:
        leaves = random_qkv(self, setting)
        sides = (
            *dense_sides(setting.device),
            Side("flex", "peer", functools.partial(self._flex, setting.device)),
            Side("natten", "peer", self._natten),
            Side("ours", "ours", functools.partial(self._ours, leaves[0], setting.backend), lazy=True),
        )
        oracle = SampledAttention(leaves, self.rule.mask_rows)
        return Prepared(leaves, torch.randn_like(leaves[0]), oracle, sides, self.rule.share)

    def _ours(self, q: torch.Tensor, backend: str) -> Built:
        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = neighborhood_attention(
                q, k, v,
                grid=self.grid, window=self.window, stride=self.stride, text_after=self.text, backend=backend,
            )  # fmt: skip
            assert isinstance(out, torch.Tensor)  # no LSE was asked for
            return out

        return Built(run, visited(self.rule, q, backend))

    def _natten(self) -> Built:
        if self.text:
            raise ValueError("it has no text rows in the same call")
        return natten.build(self.grid, self.window, self.stride)

    def _flex(self, device: torch.device) -> Built:
        return flex_windows(self.rule, self.flex_order, device)

    @functools.cached_property
    def flex_order(self) -> torch.Tensor | None:
        """The order in which flex attention visits least: raster (None) or tiles of 128 tokens. Not in its time."""
        return best_order(self.rule)

    def tile_order(self, tile: tuple[int, ...]) -> torch.Tensor:
        """(N,): the tokens tile by tile, the text behind them."""
        return tile_order(self.rule, tile)


def _case(name: str, grid, window, stride, *, heads: int, text: int = 0, quick: bool = False) -> WindowCase:  # type: ignore[no-untyped-def]
    rule = WindowRule(grid, window, stride, text)
    return WindowCase(name, rule.length, heads, quick=quick, grid=grid, window=window, stride=stride, text=text)


# Heads: enough to fill a GPU many times over, fewer than the models have, so that the whole table fits a short lease.
CASES = (
    _case("flux-4k-s16x16", (256, 256), (80, 80), (16, 16), heads=8, text=512),
    _case("flux-4k-s16x1", (256, 256), (80, 80), (16, 1), heads=8, text=512),
    _case("flux-4k-s1x1", (256, 256), (80, 80), (1, 1), heads=8, text=512),
    _case("hunyuan-18x24x24-s16x8x8", (30, 48, 80), (18, 24, 24), (16, 8, 8), heads=4, quick=True),
    _case("hunyuan-18x24x24-s1", (30, 48, 80), (18, 24, 24), (1, 1, 1), heads=4, quick=True),
    _case("hunyuan-30x40x40-s1x32x8", (30, 48, 80), (30, 40, 40), (1, 32, 8), heads=4),
    _case("wan-33k", (21, 30, 52), (13, 20, 39), (7, 10, 13), heads=12, quick=True),
    _case("wan-76k", (21, 45, 80), (15, 25, 56), (7, 15, 8), heads=6),
    _case("dense-33k", (21, 30, 52), (21, 30, 52), (1, 1, 1), heads=12),  # no hole: never slower than dense attention
    _case("1d-32k", (32768,), (2048,), (1,), heads=12, quick=True),
)
