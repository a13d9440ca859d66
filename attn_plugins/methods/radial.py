"""Radial attention (arXiv 2506.19852): a static mask whose density decays with the distance in time.

Token k of frame i sees token l of frame j, of s tokens each, with r = floor(log2(max(|i - j|, 1))), iff

    2 ** r <= s and |k - l| + 1 <= s / 2 ** r,    or    |i - j| mod ceil(2 ** r / s) = 0 and k = l,

and every token sees the first frame (the attention sink). Frames next to each other see all of each other; then the
window halves whenever the distance doubles.

Deviations: blocks of a frame are seen whole where the mask shows any of their pairs, so more is seen, not less; `decay`
below 1 narrows all windows by that factor, that of a token's own frame too. A picture's rows count as its frames,
and so do the tokens of a grid of one axis.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins.method import AttentionCall, Kept, Method, MethodConfig, Processor, SiteKind
from attn_plugins.ops.block_sparse.op import register_sparse_op
from attn_plugins.ops.checks import choose_backend, kernel_refusal, resolve_scale
from attn_plugins.ops.vmoba.layout import decode, encode
from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.sequence import Sequence


@dataclass(frozen=True)
class RadialConfig(MethodConfig):
    """The mask and its blocks.

    Args:
        block: tokens of a block; blocks lie within a frame.
        decay: factor on the widths of all windows; 1 is the published mask.
        sink: whether every token sees the first frame.
        backend: of the operator.
    """

    block: int = 128
    decay: float = 1.0
    sink: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"block={self.block!r}: give 1 or more tokens")
        if not 1e-3 <= self.decay <= 1e9:
            raise ValueError(f"decay={self.decay!r}: give a factor in 0.001..1e9; 1 is the published mask")
        object.__setattr__(self, "decay", float(self.decay))


class RadialProcessor(Processor):
    """Radial attention: one plan for all heads and items that have as much text."""

    def __init__(self, config: RadialConfig) -> None:
        self.config = config

    def refuses(self, call: AttentionCall) -> str | None:
        if call.q.shape[2] != call.k.shape[2]:
            return f"{call.k.shape[2]} keys for {call.q.shape[2]} queries: frames need one grid for both"
        if call.causal:
            return "the model masks the future, and a distance in time has no direction"
        return super().refuses(call)

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        q, sequence, config = call.q, call.sequence, self.config
        assert sequence is not None  # Layer.attend calls no processor without one
        backend = choose_backend(config.backend, q.device, kernels=True, refusal=kernel_refusal(q))
        if backend == "reference":
            backend = "cpu"  # a plan without masks has no other definition
        spec = [
            *encode(sequence, sequence.grid, sequence.grid),
            config.block,
            config.sink,
            *config.decay.as_integer_ratio(),
        ]
        return _op(q, call.k, call.v, resolve_scale(call.scale, q.shape[-1]), spec, backend)[0]

    def kept(self, call: AttentionCall, rows: torch.Tensor) -> Kept:
        sequence = call.sequence
        assert sequence is not None  # it has taken the call
        frames, tokens = _frames(sequence)
        grid = torch.arange(sequence.tokens)
        block_of = grid // tokens * -(-tokens // self.config.block) + grid % tokens // self.config.block
        seen = radial_blocks(frames, tokens, self.config)
        chosen = seen[block_of[(rows - sequence.text_before).clamp(0, sequence.tokens - 1)]]
        return Kept.on_grid(sequence, rows, block_of, chosen[None, None].to(call.q.device))

    def density(self, sequence: Sequence) -> float:
        config = dataclasses.replace(self.config, backend="auto")
        items = [sequence.item(b) for b in range(sequence.batch or 1)]
        return sum(radial_plan(item, config).density for item in items) / len(items)


def _plans_of(spec: Rows[int], q: torch.Tensor, backend: str) -> list[tuple[slice, BlockPlan]]:
    """A plan for each run of items with equal text: what a compiled graph carries of it is a list of ints."""
    *encoded, block, sink, numerator, denominator = (int(value) for value in spec)
    config = RadialConfig(block, numerator / denominator, bool(sink))
    return [(items, radial_plan(one.sequence, config)) for items, one in decode(encoded)]


_op = register_sparse_op("radial", _plans_of)


@functools.lru_cache(maxsize=64)
def radial_plan(sequence: Sequence, config: RadialConfig) -> BlockPlan:
    """The block plan of a sequence with plain valid lengths; text sees everything and is seen by all."""
    frames, tokens = _frames(sequence)
    seen = radial_blocks(frames, tokens, config)
    before, after = sequence.valid_before, sequence.valid_after
    assert isinstance(before, int) and isinstance(after, int)  # an item's are
    first, last = sequence.text_before, sequence.text_before + sequence.tokens
    edges = [(at, min(config.block, tokens - at)) for at in range(0, tokens, config.block)]
    blocks = [(first + frame * tokens + at, length) for frame in range(frames) for at, length in edges]
    text = [(start, length) for start, length in ((0, before), (last, after)) if length]
    seen = torch.nn.functional.pad(seen, (0, len(text), 0, len(text)), value=True)
    lists = [row.nonzero()[:, 0].tolist() for row in seen]
    blocks += text
    return BlockPlan.from_lists(blocks, blocks, lists, q_length=sequence.length, kv_length=sequence.length)


def _frames(sequence: Sequence) -> tuple[int, int]:
    """How many, and tokens of each."""
    grid = sequence.grid[1:] if len(sequence.grid) == 3 and sequence.grid[0] == 1 else sequence.grid
    return grid[0], math.prod(grid[1:])


def radial_blocks(frames: int, tokens: int, config: RadialConfig) -> torch.Tensor:
    """(blocks, blocks) bool: whether the mask shows any pair of two blocks, frame after frame."""
    start = torch.arange(0, tokens, config.block)
    end = (start + config.block).clamp(max=tokens)
    gap = torch.maximum(start[:, None] - end, start - end[:, None]).clamp(min=-1) + 1  # the least |k - l|
    distance = (torch.arange(frames)[:, None] - torch.arange(frames)).abs()
    halvings = 2 ** distance.clamp(min=1).log2().floor().long()
    width = torch.where(halvings <= tokens, tokens * config.decay / halvings, 0.0)
    inside = gap + 1 <= width[:, :, None, None]
    every = -(-halvings // tokens)
    inside |= (distance % every == 0)[:, :, None, None] & (gap == 0) & torch.eye(len(start), dtype=torch.bool)
    if config.sink:
        inside[:, 0] = True
    return inside.transpose(1, 2).reshape(frames * len(start), frames * len(start))


class Radial(Method):
    name = "radial"
    title = "Radial attention: density decays with distance in time"
    kind = "sparse"
    paper = "arXiv 2506.19852"
    config_class = RadialConfig
    own_settings = frozenset({"block", "decay", "sink"})

    def ladder(self, kind: SiteKind, grid: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
        return ({}, {"decay": 0.5})

    def processor(
        self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind = "self"
    ) -> Processor | None:
        assert isinstance(config, RadialConfig)  # patching makes it with config_class
        return _processor(config)


@functools.lru_cache(maxsize=64)
def _processor(config: RadialConfig) -> Processor:
    return RadialProcessor(config)
