"""Masks on a grid: generalized neighborhood attention (arXiv 2504.16922), windows shared by tiles or sliding."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch

from attn_plugins.ops import neighborhood_attention
from attn_plugins.ops.neighborhood.heads import HeadSetting
from attn_plugins.ops.neighborhood.spec import encode, plans_of
from attn_plugins.pipelines.benching.backends import flex
from attn_plugins.pipelines.benching.definitions.window_rule import WindowRule
from attn_plugins.pipelines.benching.masks.mask import Mask, Shape
from attn_plugins.pipelines.benching.sides import Built, Cannot, Setting
from attn_plugins.plan.partition import AxisTiles, Partition
from attn_plugins.plan.simulator import simulate
from attn_plugins.sequence import Sequence


@dataclass(frozen=True, eq=False)
class GridMask(Mask):
    """Windows of a grid, no text."""

    shape: Shape
    window_rule: WindowRule

    @property
    def option(self) -> str:  # type: ignore[override]
        rule = self.window_rule
        grid, window, stride = ("x".join(map(str, sizes)) for sizes in (rule.grid, rule.window, rule.stride))
        return f"grid {grid}, window {window}, stride {stride}"

    def seen(self, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return self.window_rule.seen(query, key) & (head >= 0)

    @property
    def pairs(self) -> float:
        return self.window_rule.share * self.shape.tokens**2

    def flex(self, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> Built:
        gqa = self.shape.heads != self.shape.kv_heads
        return flex_windows(self.window_rule, best_order(self.window_rule), setting.device, gqa, not setting.tiny)

    def operator(self, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> Built:
        rule = self.window_rule

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return neighborhood_attention(
                q, k, v, grid=rule.grid, window=rule.window, stride=rule.stride, backend=setting.backend
            )  # type: ignore[return-value]  # no LSE was asked for

        return Built(run, visited(rule, leaves[0], setting.backend))


def visited(rule: WindowRule, q: torch.Tensor, backend: str) -> float:
    """Density of the plan that our operator makes for these tensors."""
    setting = HeadSetting(rule.window, rule.stride, (1,) * len(rule.grid), (False,) * len(rule.grid))
    parts = plans_of(encode(Sequence(rule.grid, 0, rule.text), setting), q, backend)
    return sum(plan.density for _, plan in parts) / len(parts)


def flex_windows(
    rule: WindowRule, order: torch.Tensor | None, device: torch.device, gqa: bool = False, compiled: bool | None = None
) -> Built:
    """Flex attention over the windows, tokens in `order`; putting them so and back is in its time."""
    places = torch.arange(rule.length, device=device) if order is None else order.to(device)
    tables = flex.block_tables(rule.seen, places)
    if order is None:
        return flex.build(tables, lambda b, h, i, j: rule.seen(i, j), rule.length, None, gqa, compiled)
    narrow = places.to(torch.int32)
    seen = lambda b, h, i, j: rule.seen(narrow[i], narrow[j])  # noqa: E731
    return flex.build(tables, seen, rule.length, places, gqa, compiled)


@functools.lru_cache(maxsize=64)
def best_order(rule: WindowRule) -> torch.Tensor | None:
    """The order in which flex attention visits least: raster (None) or tiles of its blocks' size. Not in its time.

    In raster order a block is a run along the last axis; that suits wide windows, tiles suit all others.
    """
    options = {"grid": rule.grid, "window": rule.window, "stride": rule.stride}
    widths = [[2**i for i in range(8) if 2**i <= 2 * size] for size in rule.grid]
    shapes = [shape for shape in itertools.product(*widths) if torch.Size(shape).numel() == flex.BLOCK]
    if not shapes:
        return None
    tile = max(shapes, key=lambda t: simulate(**options, q_tile=t, kv_tile=t).speedup)  # type: ignore[arg-type]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def density(order: torch.Tensor | None) -> float:
        places = torch.arange(rule.length) if order is None else order
        return flex.table_density(flex.block_tables(rule.seen, places.to(device))[0], rule.length)

    return min([None, tile_order(rule, tile)], key=density)


def tile_order(rule: WindowRule, tile: tuple[int, ...]) -> torch.Tensor:
    """(N,): the tokens tile by tile, the text behind them."""
    tiles = Partition(tuple(AxisTiles(size, t) for size, t in zip(rule.grid, tile, strict=True)))
    return torch.cat([torch.from_numpy(tiles.order), torch.arange(rule.tokens, rule.length)])


def grid_of(tokens: int, axes: int = 3, least: int = 4) -> tuple[int, ...]:
    """The most even grid of so many tokens, shortest axis first: 8192 is 16x16x32.

    Raises:
        Cannot: no axis may be shorter than `least`.
    """
    sizes = [1] * axes
    for prime in sorted(_primes(tokens), reverse=True):
        sizes[sizes.index(min(sizes))] *= prime
    if min(sizes) < least:
        raise Cannot(f"{tokens} tokens are no grid of {axes} axes of {least} and more")
    return tuple(sorted(sizes))


def gna(shape: Shape, aligned: bool = True) -> GridMask:
    """Windows of half of each axis; aligned: tiles of the windows' size share theirs, else every query has its own."""
    grid = grid_of(shape.tokens)
    window = tuple(size // 2 for size in grid)
    return GridMask(shape, WindowRule(grid, window, window if aligned else (1,) * len(grid)))


def _primes(number: int) -> list[int]:
    found, prime = [], 2
    while prime * prime <= number:
        while number % prime == 0:
            found.append(prime)
            number //= prime
        prime += 1
    return found + [number] * (number > 1)
