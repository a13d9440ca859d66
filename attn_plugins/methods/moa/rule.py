"""The rules of one layer's heads: what a layer of a model is bound to."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins.methods.moa.plan import SpanPlan, cache_size


@dataclass(frozen=True)
class LayerRule:
    """`alphas`, `betas`: one of each per KV head or query head of the layer, or one for all; `length`: the least N."""

    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    sink: int
    block: int
    length: int = 1

    @classmethod
    def of(cls, plan: SpanPlan, layer: int, length: int = 1) -> LayerRule:
        return cls(plan.alphas[layer], plan.betas[layer], plan.sink, plan.block, length)

    def spans(self, n: int, heads: int, first: int = 0, among: int | None = None) -> tuple[int, ...]:
        """Tokens that each of `heads` query heads looks back at a length of `n`; they are those from `first` on of
        `among` in the whole layer, where other devices have the rest.

        Raises:
            ValueError: a layer whose heads are no multiple of the rule's.
        """
        spans = _per_head if torch.compiler.is_compiling() else _remembered  # a graph's constants need no memory
        return spans(self, max(n, self.length), heads, first, among or heads)

    def pair_fraction(self, n: int, heads: int) -> float:
        """Share of a prefill's causal pairs that are computed, mean over `heads` query heads: as `SpanPlan`'s."""
        seen = (min(span + self.sink, n) for span in self.spans(n, heads))
        return sum(kept * (2 * n + 1 - kept) for kept in seen) / (heads * n * (n + 1))

    def to_options(self) -> dict[str, Any]:
        """As reports show it: the range of what the heads keep."""
        ends = [(min(values), max(values)) for values in (self.alphas, self.betas)]
        shown = [f"{low:g}" if low == high else f"{low:g}..{high:g}" for low, high in ends]
        return {"alpha": shown[0], "beta": shown[1], "sink": self.sink}


def _per_head(rule: LayerRule, n: int, heads: int, first: int, among: int) -> tuple[int, ...]:
    if among % len(rule.alphas):
        raise ValueError(f"the rule is for {len(rule.alphas)} heads, the layer has {among}")
    rows = zip(rule.alphas, rule.betas, strict=True)
    spans = [cache_size(alpha, beta, n, rule.sink, rule.block) - rule.sink for alpha, beta in rows]
    group = among // len(spans)
    return tuple(spans[head // group] for head in range(first, first + heads))


_remembered = functools.lru_cache(maxsize=4096)(_per_head)
