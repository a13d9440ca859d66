"""VMoBA with the published blocks (arXiv 2506.23858): Wan 2.1 without training at two sizes, and its training grid."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch

from attn_plugins.ops import vmoba_attention
from attn_plugins.ops.vmoba.choice import choose_for_tiles, choose_for_tokens
from attn_plugins.ops.vmoba.layout import encode, fit_block, fit_tile
from attn_plugins.ops.vmoba.lists import attend_lists
from attn_plugins.ops.vmoba.rows_op import attend_rows
from attn_plugins.ops.vmoba.selection import Selection
from attn_plugins.pipelines.benching.backends.dense import dense_sides
from attn_plugins.pipelines.benching.definitions.block_choice import BlockChoice
from attn_plugins.pipelines.benching.oracle import SampledAttention
from attn_plugins.pipelines.benching.sides import BACKWARD, FORWARD, Built, Prepared, Setting, Side
from attn_plugins.sequence import Sequence
from benchmarks.gpu_suite.case import Case, random_qkv, times


@dataclass(frozen=True, kw_only=True)
class BlockCase(Case):
    """Random q and k: `k_blocks` of each query, or `tau` of a head, chosen for tiles of queries or (`exact`) for each.

    The part "blocks given" is the same attention over a choice made beforehand: what is left is the selection's.
    """

    grid: tuple[int, ...]
    block: tuple[int, ...]
    k_blocks: int | None = None
    tau: float | None = None
    exact: bool = False
    suite: str = "vmoba"
    head_dims: tuple[int, ...] = (128,)

    @property
    def shape(self) -> str:
        return times(self.grid)

    @property
    def option(self) -> str:
        best = f"top {self.k_blocks}" if self.k_blocks else f"tau {self.tau} of a head"
        return f"block {times(self.block)} {best} {'exact' if self.exact else 'pooled'}"

    def shrunk(self) -> BlockCase:
        grid = tuple(min(size, 7) for size in self.grid)
        block = tuple(max(1, -(-b * g // size)) for b, g, size in zip(self.block, grid, self.grid, strict=True))
        return replace(self, grid=grid, block=block, tokens=math.prod(grid), heads=2, head_dims=(16,))

    @property
    def how(self) -> Selection:
        if self.k_blocks:
            return Selection("topk", "query", k_blocks=self.k_blocks)
        return Selection("threshold", "head", tau=self.tau)

    @functools.cached_property
    def choice(self) -> BlockChoice:
        tile = None if self.exact else fit_tile(self.block, None)
        return BlockChoice(self.grid, self.block, tile, self.k_blocks, self.tau or 0.0)

    def prepare(self, setting: Setting) -> Prepared:
        q, k, v = leaves = random_qkv(self, setting)
        group = q.shape[1] // k.shape[1]
        block_of = self.choice.boxes()[0].to(q.device)

        @functools.lru_cache(maxsize=4)
        def chosen(head: int) -> torch.Tensor:
            return self.choice(q[-1, head], k[-1, head // group])

        def mask_rows(heads: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return torch.stack([chosen(head)[rows][:, block_of] for head in heads.tolist()])

        spec = self._spec()
        choose = choose_for_tokens if self.exact else choose_for_tiles
        made = choose(q, k, spec, self.how, setting.head_dim**-0.5, setting.backend)
        density = self._density(made)

        def ours() -> Built:
            return Built(functools.partial(self._attend, backend=setting.backend), density)

        def given() -> Built:
            scale = setting.head_dim**-0.5
            if self.exact:
                return Built(
                    lambda q, k, v: attend_rows(q, k, v, made, scale, spec, False, setting.backend)[0], density
                )
            return Built(lambda q, k, v: attend_lists(q, k, v, *made, scale, spec, setting.backend)[0], density)

        sides = (
            *dense_sides(setting.device),
            Side("blocks given", "part", given, lazy=True),
            Side("ours", "ours", ours, lazy=True),
        )
        return Prepared(leaves, torch.randn_like(q), SampledAttention(leaves, mask_rows), sides, density)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str) -> torch.Tensor:
        how = self.how
        out = vmoba_attention(
            q, k, v, grid=self.grid, block=self.block, rule=how.rule, scope=how.scope, k_blocks=how.k_blocks,
            tau=how.tau, exact=self.exact, backend=backend,
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)  # no LSE was asked for
        return out

    def _spec(self) -> list[int]:
        sizes = fit_block(self.grid, self.block)
        return encode(Sequence(self.grid), sizes, fit_tile(sizes, None))

    def _density(self, made: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> float:
        """Share of all pairs that lie in the chosen blocks."""
        block_of, row_of = self.choice.boxes()
        sizes = torch.bincount(block_of).double()
        if isinstance(made, torch.Tensor):
            seen = made.sum((0, 1), dtype=torch.float64).cpu() @ sizes
            return float(seen.sum()) / (self.batch * self.heads * self.tokens**2)
        lists, count = (t.cpu() for t in made)
        behind = torch.arange(lists.shape[-1]) >= count[..., None]
        seen = sizes[lists.long()].masked_fill(behind, 0.0).sum(-1) * torch.bincount(row_of)
        return float(seen.sum()) / (self.batch * self.heads * self.tokens**2)


EXACT_MARKS = {FORWARD: (0.65, 0.8), BACKWARD: (0.65, 0.8)}
# Grid, then block and k of the 1-D, 2-D and 3-D partitions; or tau of all: then the density is the content's, and no
# speed is promised.
SETTINGS = (
    ("480p", (21, 30, 52), (((3, 30, 52), 2), ((21, 5, 13), 6), ((7, 5, 13), 18)), None),
    ("720p", (21, 45, 80), (((3, 45, 80), 2), ((21, 9, 10), 10), ((7, 15, 20), 9)), None),
    ("train", (24, 36, 64), (((3, 36, 64), None), ((24, 6, 8), None), ((8, 12, 8), None)), 0.25),
)
CASES = tuple(
    BlockCase(
        f"vmoba-{name}-{axes}d{'-exact' if exact else ''}", math.prod(grid), 12, grid=grid, block=block, k_blocks=k,
        tau=tau, exact=exact, quick=(name, axes) == ("480p", 3),
        **({"marks": EXACT_MARKS} if exact else {}) if tau is None else {"marks": {}},
    )
    for name, grid, blocks, tau in SETTINGS
    for axes, (block, k) in enumerate(blocks, 1)
    for exact in (False, True)
)  # fmt: skip
