"""Random lists of whole blocks, per head, at several densities: the operator itself, with no mask and no structure."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from attn_plugins.ops import block_sparse_attention
from attn_plugins.pipelines.benching.backends import flex
from attn_plugins.pipelines.benching.backends.dense import dense_sides
from attn_plugins.pipelines.benching.oracle import SampledAttention
from attn_plugins.pipelines.benching.sides import Built, Prepared, Setting, Side
from attn_plugins.plan.block_plan import BlockPlan
from benchmarks.gpu_suite.case import Case, random_qkv

BLOCK = flex.BLOCK


@dataclass(frozen=True, kw_only=True)
class ListCase(Case):
    """Every query block of 128 tokens sees `share` of the KV blocks, its own among them."""

    share: float

    @property
    def shape(self) -> str:
        return f"{self.tokens}"

    @property
    def option(self) -> str:
        return f"random lists of {BLOCK} tokens, density {self.share}"

    def shrunk(self) -> ListCase:
        return replace(self, tokens=5 * BLOCK, heads=2, head_dims=(16,))

    @property
    def blocks(self) -> int:
        return self.tokens // BLOCK

    def lists(self) -> torch.Tensor:
        """(H, Q, L) int32, ascending: the KV blocks of each query block."""
        count = max(1, round(self.share * self.blocks))
        scores = torch.rand(self.heads, self.blocks, self.blocks, generator=torch.Generator().manual_seed(3))
        scores.diagonal(dim1=1, dim2=2).fill_(2.0)
        return scores.topk(count, dim=-1).indices.sort(-1).values.to(torch.int32)

    def table(self) -> torch.Tensor:
        """(H, Q, K) bool."""
        return torch.zeros(self.heads, self.blocks, self.blocks, dtype=torch.bool).scatter_(
            -1, self.lists().long(), True
        )

    def plan(self) -> BlockPlan:
        lists = self.lists()[None]
        start = torch.arange(0, self.tokens, BLOCK, dtype=torch.int32)
        size = torch.full_like(start, BLOCK)
        count = torch.full(lists.shape[:3], lists.shape[3], dtype=torch.int32)
        return BlockPlan(self.tokens, self.tokens, start, size, start, size, lists, count, count)

    def prepare(self, setting: Setting) -> Prepared:
        leaves = random_qkv(self, setting)
        table = self.table().to(setting.device)

        def mask_rows(heads: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return table[heads[:, None], rows[None] // BLOCK].repeat_interleave(BLOCK, dim=-1)

        def ours() -> Built:
            plan = self.plan()
            return Built(functools.partial(block_sparse_attention, plan=plan, backend=setting.backend), plan.density)  # type: ignore[arg-type]

        def by_flex() -> Built:
            return flex.build((table, table), lambda b, h, i, j: table[h, i // BLOCK, j // BLOCK], self.tokens, None)

        sides = (
            *dense_sides(setting.device),
            Side("flex", "peer", by_flex),
            Side("ours", "ours", ours, lazy=True),
        )
        oracle = SampledAttention(leaves, mask_rows)
        return Prepared(leaves, torch.randn_like(leaves[0]), oracle, sides, float(table.double().mean()))


CASES = tuple(
    ListCase(f"random-33k-{share}", 32768, 12, quick=share == 0.1, share=share) for share in (0.05, 0.1, 0.25, 0.5)
)
