"""Prefill with spans per head (MoA, arXiv 2406.14909) on layers of Llama-2-7B's and Llama-3-8B's shape."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

from attn_plugins.ops import span_attention
from attn_plugins.pipelines.benching.backends import flex
from attn_plugins.pipelines.benching.backends.dense import BACKENDS, PACKAGES
from attn_plugins.pipelines.benching.oracle import SampledAttention
from attn_plugins.pipelines.benching.sides import FORWARD, Built, Prepared, Run, Setting, Side
from benchmarks.gpu_suite.case import Case, random_qkv

SHAPES = {"7b": (32, 32), "8b": (32, 8)}  # query heads, KV heads
LENGTHS = (16384, 8192, 32768)  # what a run cut short should have, first
SINK = 64


@dataclass(frozen=True, kw_only=True)
class SpanCase(Case):
    """`shares`: the spans of the KV heads in turn, as shares of the tokens.

    The baseline is the fastest dense *causal* kernel, and densities are shares of the causal pairs. That of ours is the
    mask's own, not that of the blocks which its plan visits: `share` is the share of what the FLOPs alone allow.
    """

    shares: tuple[float, ...]
    sink: int = SINK
    suite: str = "moa"

    @property
    def shape(self) -> str:
        return f"{self.heads} / {self.kv_heads} heads"

    @property
    def option(self) -> str:
        return f"spans {'+'.join(f'{share:g}' for share in self.shares)} N, {self.sink} sinks"

    @property
    def spans(self) -> list[int]:
        """Of each KV head. The first and the last, which the check looks at, have the first and the last share."""
        return [int(self.tokens * self.shares[head % len(self.shares)]) for head in range(self.kv_heads or self.heads)]

    @property
    def pair_share(self) -> float:
        """Row i sees min(i + 1, span + sink) keys, of i + 1."""
        n = self.tokens
        kept = [min(span + self.sink, n) for span in self.spans]
        return sum(one * (2 * n + 1 - one) for one in kept) / (len(kept) * n * (n + 1))

    def shrunk(self) -> SpanCase:
        group = self.heads // (self.kv_heads or self.heads)
        return replace(self, tokens=611, heads=2 * group, kv_heads=2, sink=5, head_dims=(16,))

    def prepare(self, setting: Setting) -> Prepared:
        leaves = random_qkv(self, setting)
        group = self.heads // len(self.spans)
        spans = torch.tensor(self.spans, device=setting.device).repeat_interleave(group)

        def seen(span: torch.Tensor | int, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            return (j <= i) & ((j < self.sink) | (i - j < span))

        def mask_rows(heads: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            keys = torch.arange(self.tokens, device=rows.device)
            return seen(spans[heads][:, None, None], rows[:, None], keys)

        def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = span_attention(q, k, v, spans=self.spans, sink=self.sink, backend=setting.backend)
            assert isinstance(out, torch.Tensor)  # no LSE was asked for
            return out

        def by_flex() -> Built:
            places = torch.arange(self.tokens, device=setting.device)
            tables = {span: flex.block_tables(functools.partial(seen, span), places) for span in set(self.spans)}
            each = [tables[span] for span in spans.tolist()]
            blocks = torch.cat([one[0] for one in each]), torch.cat([one[1] for one in each])
            built = flex.build(blocks, lambda b, h, i, j: seen(spans[h], i, j), self.tokens, None, gqa=group > 1)
            return replace(built, density=built.density * 2 * self.tokens / (self.tokens + 1))

        sides = (
            *causal_sides(setting.device, group > 1),
            Side("flex", "peer", by_flex),
            Side("ours", "ours", lambda: Built(ours, self.pair_share), lazy=True),
        )
        return Prepared(
            leaves, torch.randn_like(leaves[0]), SampledAttention(leaves, mask_rows), sides, self.pair_share
        )


def causal_sides(device: torch.device, gqa: bool) -> tuple[Side, ...]:
    """Dense causal attention, a side per kernel, as `dense_sides` has them without a mask."""
    if device.type != "cuda":
        return (Side("sdpa", "dense", lambda: Built(_causal(gqa), 1.0)),)
    sides = [Side(name, "dense", functools.partial(_forced, kind, gqa)) for name, kind in BACKENDS.items()]
    sides += [Side(name, "dense", functools.partial(_packaged, module)) for name, module in PACKAGES.items()]
    return tuple(sides)


def _causal(gqa: bool) -> Run:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)


def _forced(kind: object, gqa: bool) -> Built:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(kind):  # type: ignore[arg-type]  # PyTorch raises where this kernel cannot run
            return _causal(gqa)(q, k, v)

    return Built(run, 1.0)


def _packaged(module: str) -> Built:
    function: Callable[..., torch.Tensor] = importlib.import_module(module).flash_attn_func

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = function(
            *(t.transpose(1, 2) for t in (q, k, v)), causal=True
        )  # (B, N, H, D), as our inputs lie in memory
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return Built(run, 1.0)


PLANS = {"mixed": (1 / 8, 1.0), "eighth": (1 / 8,)}
CASES = tuple(
    SpanCase(
        f"moa-{model}-{tokens >> 10}k-{plan}", tokens, heads, kv_heads=kv_heads, head_dims=(128,), shares=shares,
        quick=(model, tokens, plan) == ("8b", 16384, "eighth"), marks={FORWARD: (0.65, 0.8)},
    )
    for tokens in LENGTHS
    for model, (heads, kv_heads) in SHAPES.items()
    for plan, shares in PLANS.items()
)  # fmt: skip
