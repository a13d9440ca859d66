"""Routed heads (MoH, arXiv 2410.11842): a top-k of heads for every token, on layers of 32 heads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from attn_plugins.ops import routed_head_attention
from attn_plugins.pipelines.benching.backends.dense import dense_sides
from attn_plugins.pipelines.benching.definitions.gated_rows import GatedRows
from attn_plugins.pipelines.benching.sides import FORWARD, Built, Prepared, Setting, Side
from benchmarks.gpu_cases.moa import causal_sides
from benchmarks.gpu_suite.case import Case, random_qkv

SHAPES = {"mha": (32, 32), "gqa": (32, 8)}  # query heads, KV heads
MLP = 10.5  # products of a model's feed-forward in units of width ** 2 a token: three matrices of 3.5 widths


@dataclass(frozen=True, kw_only=True)
class RoutedCase(Case):
    """A token uses its `active` share of the heads, at random. The baseline is the fastest dense kernel times the gate.

    `density` is the share of the rows, so that `share` is what is reached of 1 / f. The option says what that bounds:
    attention alone (core), with its projections (layer), with the feed-forward (model).
    """

    active: float
    causal: bool
    suite: str = "routed_heads"

    @property
    def shape(self) -> str:
        return f"{self.heads} / {self.kv_heads} heads, {'causal' if self.causal else 'bidirectional'}"

    @property
    def option(self) -> str:
        bounds = (f"{name} {self.bound(part, self.head_dims[0]):.2f}x" for name, part in PARTS.items())
        return f"{self.active:.0%} of the heads: at most {', '.join(bounds)} at D {self.head_dims[0]}"

    def bound(self, besides: tuple[bool, bool], head_dim: int) -> float:
        """By the operations of (projections, feed-forward) besides the scores and the values; only these are saved."""
        width = self.heads * head_dim
        core = 4 * self.tokens * width / (2 if self.causal else 1)
        projections = 4 * width**2 * (1 + (self.kv_heads or self.heads) / self.heads)
        rest = besides[0] * projections + besides[1] * 2 * MLP * width**2
        return (core + rest) / (self.active * core + rest)

    def shrunk(self) -> RoutedCase:
        group = self.heads // (self.kv_heads or self.heads)
        return replace(self, tokens=311, heads=2 * group, kv_heads=2, head_dims=(16,))

    def prepare(self, setting: Setting) -> Prepared:
        leaves = random_qkv(self, setting)
        rng = torch.Generator(setting.device).manual_seed(1)
        scores = torch.rand(self.batch, self.tokens, self.heads, generator=rng, device=setting.device)
        used = scores.topk(max(1, round(self.active * self.heads)), dim=-1).indices
        gates = torch.zeros_like(scores).scatter_(-1, used, 0.5 + scores.gather(-1, used)).to(setting.dtype)
        share = (gates != 0).float().mean().item()
        weights = gates.transpose(1, 2)[..., None]

        def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return routed_head_attention(q, k, v, gates, causal=self.causal, backend=setting.backend)

        def gated(side: Side) -> Side:
            def build() -> Built:
                run = side.build().run
                return Built(lambda q, k, v: run(q, k, v) * weights, 1.0)

            return replace(side, build=build)

        group = self.heads // (self.kv_heads or self.heads)
        dense = causal_sides(setting.device, group > 1) if self.causal else dense_sides(setting.device, group)
        sides = (*map(gated, dense), Side("ours", "ours", lambda: Built(ours, share)))

        def seen(heads: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            keys = torch.arange(self.tokens, device=rows.device)
            mask = keys <= rows[:, None] if self.causal else keys[None] >= torch.zeros_like(rows)[:, None]
            return mask[None].expand(len(heads), -1, -1)

        return Prepared(leaves, torch.randn_like(leaves[0]), GatedRows(leaves, seen, gates=gates), sides, share)


PARTS = {"core": (False, False), "layer": (True, False), "model": (True, True)}
CASES = tuple(
    RoutedCase(
        f"routed-{'causal-' if causal else ''}{model}-{tokens >> 10}k-{active:.0%}".replace("%", ""), tokens, heads,
        kv_heads=kv_heads, active=active, causal=causal, marks={FORWARD: (0.8, 0.9)},
        quick=(model, tokens, active) == ("mha", 16384, 0.5),
    )
    for causal in (False, True)
    for model, (heads, kv_heads) in SHAPES.items()
    for tokens in (2048, 8192, 16384, 32768)
    for active in (0.5, 0.75)
)  # fmt: skip
