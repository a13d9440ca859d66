"""Problems in which heads differ: MoA's spans (arXiv 2406.14909) and MoH's routed heads (arXiv 2410.11842)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_plugins.ops import routed_head_attention, span_attention
from attn_plugins.pipelines.benching.definitions.gated_rows import GatedRows
from attn_plugins.pipelines.benching.masks.mask import Mask, Shape
from attn_plugins.pipelines.benching.masks.rows import RowMask, Rows
from attn_plugins.pipelines.benching.sides import Built, Oracle, Setting

SPANS, SINK = (16, 8, 4, 2), 64  # spans are N / 16, N / 8, ..., by KV head in turn; and so many sinks, N / 16 at most
ACTIVE = 2  # a token uses one of so many heads


@dataclass(frozen=True, eq=False)
class SpanMask(RowMask):
    """Causal, each KV head with a span of its own, and shared sinks."""

    spans: tuple[int, ...] = ()
    sink: int = 0

    def operator(self, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> Built:
        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return span_attention(q, k, v, spans=self.spans, sink=self.sink, backend=setting.backend)  # type: ignore[return-value]

        return Built(run)  # its CPU form is not a plan: what it visits depends on a choice made inside


def spans(shape: Shape) -> SpanMask:
    """A span for each KV head."""
    sink = min(SINK, max(shape.tokens // 16, 1))
    sizes = tuple(max(shape.tokens // SPANS[head % len(SPANS)], 1) for head in range(shape.kv_heads))
    return _spans(shape, sizes, sink, f"spans N / {', N / '.join(map(str, SPANS))}, {sink} sinks")


def with_spans(mask: RowMask) -> SpanMask:
    """A causal mask that is a span alone, alike for all heads, with our operator for it."""
    assert mask.told is not None
    left = mask.told.window[0]
    span = mask.shape.tokens if left < 0 else left + 1
    return SpanMask(
        mask.shape, mask.option, mask.intervals, mask.rule, mask.edges, mask.told, True,
        spans=(span,) * mask.shape.kv_heads,
    )  # fmt: skip


def _spans(shape: Shape, sizes: tuple[int, ...], sink: int, option: str) -> SpanMask:
    group = shape.heads // shape.kv_heads
    span = torch.tensor(sizes).repeat_interleave(group)[:, None]
    i = torch.arange(shape.tokens)[None] + torch.zeros_like(span)
    rows = Rows(torch.minimum(i + 1, torch.tensor(sink)), (i - span + 1).clamp(min=0), i + 1)

    def rule(h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & ((k < sink) | (q - k < span[:, 0].to(q.device)[h]))

    return SpanMask(shape, option, rows, rule, (sink,), None, True, spans=sizes, sink=sink)


@dataclass(frozen=True, eq=False)
class RoutedHeads(Mask):
    """Each token uses half of the heads, at random; the result is times its gates (B, N, H). Bidirectional."""

    shape: Shape
    option: str
    plain = False

    def seen(self, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= 0) & (key >= 0) & (head >= 0)

    @property
    def pairs(self) -> float:
        used = max(self.shape.heads // ACTIVE, 1)
        return self.shape.tokens**2 * used / self.shape.heads

    def gates(self, like: torch.Tensor) -> torch.Tensor:
        shape = self.shape
        rng = torch.Generator(like.device).manual_seed(1)
        scores = torch.rand(shape.batch, shape.tokens, shape.heads, generator=rng, device=like.device)
        used = scores.topk(max(shape.heads // ACTIVE, 1), dim=-1).indices
        return torch.zeros_like(scores).scatter_(-1, used, 0.5 + scores.gather(-1, used)).to(like.dtype)

    def oracle(self, leaves: tuple[torch.Tensor, ...]) -> Oracle:
        return GatedRows(leaves, self.rows, gates=self.gates(leaves[0]))

    def operator(self, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> Built:
        gates = self.gates(leaves[0])
        return Built(lambda q, k, v: routed_head_attention(q, k, v, gates, backend=setting.backend), self.density)


def routed(shape: Shape) -> RoutedHeads:
    """Half of the heads of every token."""
    return RoutedHeads(shape, f"{max(shape.heads // ACTIVE, 1)} of {shape.heads} heads a token")
