"""What is summed up of one layer while it runs: a few query rows of each head at a time, never all pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from attn_plugins.measured_call import _of, _real_rows, dense_view
from attn_plugins.method import AttentionCall
from attn_plugins.metrics.entropy import row_entropy
from attn_plugins.metrics.hops import axis_distances, mass_by, over_grid, window_numbers
from attn_plugins.metrics.recall import attention_rows, spread
from attn_plugins.sequence import Sequence

FIRST = 1  # tokens at the start of a text that count as its beginning (BOS)
ITEMS = 8  # items of a batch that are looked at, at most: attention over time has one for each place of a picture
SHOWN = 4096  # tokens of the one row of each head that is kept as a picture, at most


class Places:
    """Where the sampled queries of a call stand, by raster number (R,), and how far each key is: for all heads at once.

    hops, numbers: (R, N): of Chebyshev distance, and of the least window (grids) or tokens back (texts). distances:
    (R, size) per axis.
    """

    def __init__(self, queries: torch.Tensor, grid: tuple[int, ...], causal: bool) -> None:
        self.queries = queries
        self.distances = axis_distances(queries, grid)
        self.hops = over_grid(self.distances, torch.maximum)
        self.numbers = self.hops if causal else window_numbers(queries, grid)


@dataclass
class Means:
    """Sums over rows, of one layer in one step: (heads,) float64 each."""

    entropy: torch.Tensor
    distance: torch.Tensor
    rows: int = 0


@dataclass
class LayerSums:
    """Sums over sampled rows, of one layer. Tensors have a row for each query head, and are float64 on the CPU.

    kind: of its attention; index: its number among its kind. grid: tokens per axis of the largest call; calls on other
    grids are not added. hops: mass by Chebyshev distance, or tokens back in a text. axes: by distance on each axis.
    own, text, first: mass on the query's own token, on text beside a grid, and on the first token of a text (or on all
    text before a grid). windows: `window_mass` of all heads (grids). behind: mass by tokens back, of keys behind the
    sinks (texts). steps: entropy and distance by step. picture: one row's weights, of the query `shown_at`.
    """

    name: str
    kind: str
    sinks: int
    index: int = 0
    grid: tuple[int, ...] = ()
    heads: int = 0
    kv_heads: int = 0
    rows: int = 0
    hops: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    axes: list[torch.Tensor] = field(default_factory=list)
    own: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    text: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    first: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    windows: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    behind: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    steps: dict[int, Means] = field(default_factory=dict)
    picture: torch.Tensor | None = None
    shown_at: int = 0

    def add(self, call: AttentionCall, most: int, step: int) -> None:
        """`most` rows of each head of a call, those that ask and are real."""
        sequence = Sequence((call.k.shape[2],)) if call.kind == "causal" else call.sequence
        if sequence is None or call.keys is not None:  # of padded texts, places are not told by row numbers
            return
        if math.prod(sequence.grid) > math.prod(self.grid or (0,)):
            self._begin(sequence.grid, call)
        elif sequence.grid != self.grid:
            return
        rows = _real_rows(call)
        first = 0 if call.kind == "causal" else sequence.text_before
        offset = call.k.shape[2] - call.q.shape[2] if call.kind == "causal" else 0
        rows = rows[(rows >= first) & (rows < first + sequence.tokens)]
        if not len(rows):
            return
        rows = rows[spread(len(rows), most)]
        shown, bias = dense_view(call, rows.to(call.q.device))
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        means = self.steps.setdefault(step, Means(torch.zeros(self.heads).double(), torch.zeros(self.heads).double()))
        places = Places(rows - first + offset, sequence.grid, call.kind == "causal")
        for item in spread(call.q.shape[0], ITEMS).tolist():
            for head in range(self.heads):
                sees = _of(shown, item, head)
                weights, _ = attention_rows(
                    call.q[item, head, rows.to(call.q.device)], call.k[item, head // (self.heads // self.kv_heads)],
                    call.v[item, head // (self.heads // self.kv_heads)], sees, scale,
                    bias=None if bias is None else _of(bias, item, head), softcap=call.softcap,
                    sink=None if call.sinks is None else call.sinks[head],
                )  # fmt: skip
                self._row(head, weights.double().cpu(), places, sequence, means)
            self.rows += len(rows)
            means.rows += len(rows)

    def _begin(self, grid: tuple[int, ...], call: AttentionCall) -> None:
        heads, size = call.q.shape[1], math.prod(grid)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self.grid, self.heads, self.kv_heads, self.rows = grid, heads, call.k.shape[1], 0
        self.hops = zeros(heads, max(grid))
        self.axes = [zeros(heads, axis) for axis in grid]
        self.own, self.text, self.first = zeros(heads), zeros(heads), zeros(heads)
        causal = self.kind == "causal"
        self.windows, self.behind = zeros(*(() if causal else grid)), zeros(heads if causal else 0, size)
        self.steps, self.picture = {}, None

    def _row(self, head: int, weights: torch.Tensor, places: Places, sequence: Sequence, means: Means) -> None:
        """The rows (R, keys) of one head."""
        causal, queries = self.kind == "causal", places.queries
        before = 0 if causal else sequence.text_before
        grid = weights[:, before : before + sequence.tokens]
        mass = mass_by(grid, places.hops, self.hops.shape[1])
        self.hops[head] += mass
        for axis, distances in enumerate(places.distances):
            others = [1 + other for other in range(len(self.grid)) if other != axis]
            of_axis = grid.view(len(grid), *self.grid).sum(others) if others else grid
            self.axes[axis][head] += mass_by(of_axis, distances, self.grid[axis])
        self.own[head] += mass[0]
        self.text[head] += weights.sum() - grid.sum()
        self.first[head] += grid[:, :FIRST].sum() if causal else weights[:, :before].sum()
        if causal:
            behind = mass_by(grid[:, self.sinks :], places.numbers[:, self.sinks :], sequence.tokens)
            self.behind[head] += behind
        else:
            self.windows += mass_by(grid, places.numbers, math.prod(self.grid)).view(self.grid)
        means.entropy[head] += row_entropy(weights).sum()
        means.distance[head] += (mass * torch.arange(len(mass))).sum() / (mass.sum() / len(queries)).clamp(min=1e-30)
        if self.picture is None:
            self.picture = torch.zeros(self.heads, *_picture_size(self.grid), dtype=torch.float32)
            middle = [(size - 1) // 2 for size in self.grid] if self.kind != "causal" else [self.grid[0] - 1]
            wanted = sum(place * math.prod(self.grid[axis + 1 :]) for axis, place in enumerate(middle))
            self.shown_at = int(queries[(queries - wanted).abs().argmin()])
        here = (queries == self.shown_at).nonzero()
        if len(here) and not bool(self.picture[head].any()):
            self.picture[head] = _pooled(grid[int(here[0])].float().view(self.grid), self.picture.shape[1:])


def _picture_size(grid: tuple[int, ...]) -> tuple[int, ...]:
    sizes = list(grid)
    while math.prod(sizes) > SHOWN:
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        sizes[largest] = -(-sizes[largest] // 2)
    return tuple(sizes)


def _pooled(weights: torch.Tensor, sizes: torch.Size) -> torch.Tensor:
    """Means over cells, in as many axes as there are."""
    pools: list[Callable[..., torch.Tensor]] = [F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d]
    return pools[weights.ndim - 1](weights[None], tuple(sizes))[0]
