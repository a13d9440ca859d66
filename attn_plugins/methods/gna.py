"""GNA: generalized neighborhood attention (arXiv 2504.16922; stride 1 is neighborhood attention, 2403.04690).

Each token of a grid attends to the window around it, text to everything. Neighborhood attention, halo, blocked, grid
and sliding-tile attention are settings of it: see the constructors of `GNAConfig`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attn_plugins.method import AttentionCall, Kept, Method, MethodConfig, Processor, SiteKind
from attn_plugins.methods.gna_causal import CausalWindowProcessor
from attn_plugins.methods.gna_setting import Fitted, Setting
from attn_plugins.ops import neighborhood_attention
from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.cost import choose_tiles
from attn_plugins.plan.neighborhood import cached_neighborhood_plan
from attn_plugins.plan.windows import axis_windows
from attn_plugins.sequence import Sequence

SETTING = ("window", "stride", "dilation", "causal")


@dataclass(frozen=True)
class GNAConfig(MethodConfig):
    """What to see.

    Args:
        window: keys per axis: tokens, -1 for the whole axis, or a share of the axis (0.5). One value or one per axis.
            None is half of every axis of a grid, and 4,096 tokens of a text.
        stride: queries that share a window, per axis; 1 is neighborhood attention. "auto" is a quarter of the window on
            a grid, and 1 in a text.
        dilation: distance between the keys of a window, per axis.
        causal: whether an axis sees only itself and what came before.
        base_size: the token grid that the numbers are for; on another grid they are scaled.
        small_grid: "shrink" (to fit a grid smaller than a window) or "error".
        per_layer: rows {layers: [...], and any of window, stride, dilation, causal}; other layers take those above.
        per_head: rows {heads: [...], and any of them}; other heads take those above.
        backend: of the operator.
    """

    window: Any = None
    stride: Any = "auto"
    dilation: Any = 1
    causal: Any = False
    base_size: tuple[int, ...] | None = None
    small_grid: str = "shrink"
    per_layer: Any = ()
    per_head: Any = ()
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.small_grid not in ("shrink", "error"):
            raise ValueError(f'small_grid={self.small_grid!r}: legal are "shrink" and "error"')
        for name, members in (("per_layer", "layers"), ("per_head", "heads")):
            given = [{key: _hashable(value) for key, value in dict(row).items()} for row in getattr(self, name)]
            rows = tuple(tuple(sorted(row.items())) for row in given)  # equal rows are equal in whatever order
            object.__setattr__(self, name, rows)
            for row in rows:
                unknown = {key for key, _ in row} - {members, *SETTING}
                if unknown or members not in dict(row):
                    raise ValueError(f"{name}: a row has {members!r} and any of {', '.join(SETTING)}; got {dict(row)}")
                if not isinstance(dict(row)[members], tuple):
                    raise ValueError(f"{name}: {members!r} is a list of numbers; got {dict(row)[members]!r}")
                self._setting(row)
        self._setting(())

    def _setting(self, row: tuple[tuple[str, Any], ...]) -> Setting:
        changed = {key: value for key, value in row if key in SETTING}
        values = {name: changed.get(name, getattr(self, name)) for name in SETTING}
        return Setting(**(values if values["window"] is not None else {**values, "window": 0.5}))

    def for_layer(self, index: int) -> GNAConfig:
        """The config of one layer: its `per_layer` row applied, and none left."""
        for row in self.per_layer:
            if index in dict(row)["layers"]:
                changed = {key: value for key, value in row if key in SETTING}
                return dataclasses.replace(self, per_layer=(), **changed)
        return dataclasses.replace(self, per_layer=())

    def fit(self, grid: tuple[int, ...], heads: int) -> list[Fitted]:
        """The setting of each of `heads` query heads on `grid`; one entry if they are all alike."""
        shared = self._setting(()).fit(grid, self.base_size, self.small_grid)
        if not self.per_head:
            return [shared]
        fitted = [shared] * heads
        for row in self.per_head:
            one = self._setting(row).fit(grid, self.base_size, self.small_grid)
            for head in dict(row)["heads"]:
                if not 0 <= head < heads:
                    raise ValueError(f"per_head: head {head}, but the layer has {heads} query heads")
                fitted[head] = one
        return fitted

    def to_options(self) -> dict[str, Any]:
        options = super().to_options()
        for name in ("per_layer", "per_head"):
            if name in options:
                options[name] = [dict(row) for row in options[name]]
        return options

    @classmethod
    def neighborhood(cls, window: Any, dilation: Any = 1) -> GNAConfig:
        """Neighborhood attention, dilated with `dilation` > 1 (2204.07143, 2209.15001): every token its own window."""
        return cls(window=window, stride=1, dilation=dilation)

    @classmethod
    def halo(cls, block: int, halo: int) -> GNAConfig:
        """HaloNet (2103.12731): blocks that see `halo` tokens around them too (shifted, not padded, at borders)."""
        return cls(window=block + 2 * halo, stride=block)

    @classmethod
    def blocked(cls, block: Any) -> GNAConfig:
        """Disjoint blocks, as Swin's windows or MaxViT's block attention (2204.01697)."""
        return cls(window=block, stride=block)

    @classmethod
    def grid_attention(cls, window: int, size: int) -> GNAConfig:
        """MaxViT's grid attention (2204.01697) on axes of `size` tokens: `window` keys spread evenly over the axis."""
        return cls(window=window, stride=window, dilation=size // window)

    @classmethod
    def sliding_tile(cls, tile: tuple[int, ...], tiles: tuple[int, ...]) -> GNAConfig:
        """Sliding Tile Attention (2502.04507): tiles that see `tiles` (odd) tiles around them, shifted at borders."""
        return cls(window=tuple(t * n for t, n in zip(tile, tiles, strict=True)), stride=tile)


class GNAProcessor(Processor):
    """GNA at the layers of one setting."""

    def __init__(self, config: GNAConfig) -> None:
        self.config = config

    def refuses(self, call: AttentionCall) -> str | None:
        if call.q.shape[2] != call.k.shape[2]:
            return f"{call.k.shape[2]} keys for {call.q.shape[2]} queries: a window needs one grid for both"
        if call.causal:
            return "the model masks the future in raster order, which is no window over a grid"
        return super().refuses(call)

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        sequence = call.sequence
        assert sequence is not None  # Layer.attend calls no processor without one
        rows = self._fitted(call, sequence)
        columns = {name: [getattr(row, name) for row in rows] for name in SETTING}
        setting: dict[str, Any] = {name: column if len(column) > 1 else column[0] for name, column in columns.items()}
        out = neighborhood_attention(
            call.q,
            call.k,
            call.v,
            grid=sequence.grid,
            **setting,
            text_before=_text(sequence.text_before, sequence.valid_before, call.q.shape[0]),
            text_after=_text(sequence.text_after, sequence.valid_after, call.q.shape[0]),
            scale=call.scale,
            backend=self.config.backend,
        )
        assert isinstance(out, torch.Tensor)  # no LSE was asked for
        return out

    def _fitted(self, call: AttentionCall, sequence: Sequence) -> list[Fitted]:
        """The setting of each query head of the call; one entry if they are all alike."""
        heads = call.q.shape[1]
        rows = self.config.fit(sequence.grid, call.layer_heads or heads)
        return rows[call.first_head : call.first_head + heads] if len(rows) > 1 else rows

    def kept(self, call: AttentionCall, rows: torch.Tensor) -> Kept:
        sequence = call.sequence
        assert sequence is not None  # it has taken the call
        tokens = (rows - sequence.text_before).clamp(0, sequence.tokens - 1).numpy()
        coordinates = np.unravel_index(tokens, sequence.grid)
        per_head = []
        for one in self._fitted(call, sequence):
            seen = torch.ones(len(rows), 1, dtype=torch.bool)
            axes = axis_windows(sequence.grid, one.window, one.stride, one.dilation, one.causal)
            for axis, queries in zip(axes, coordinates, strict=True):
                seen = (seen[:, :, None] & torch.from_numpy(axis.seen_from(queries))[:, None]).flatten(1)
            per_head.append(seen)
        chosen = torch.stack(per_head)[None].to(call.q.device)
        return Kept.on_grid(sequence, rows, torch.arange(sequence.tokens), chosen)

    def plan(self, sequence: Sequence, head: int = 0, heads: int = 1, itemsize: int = 4) -> BlockPlan:
        """The block plan of a head, as the CPU backend runs it (`sequence` with plain valid lengths)."""
        fitted = self.config.fit(sequence.grid, heads)
        one = fitted[head if len(fitted) > 1 else 0]
        axes = axis_windows(sequence.grid, one.window, one.stride, one.dilation, one.causal)
        tiles = choose_tiles(axes, _real_text(sequence), itemsize)
        return cached_neighborhood_plan(sequence, axes, tiles.q_tile, tiles.kv_tile)

    def density(self, sequence: Sequence) -> float:
        """Share of the dense (query, key) pairs that a block plan of well-chosen tiles computes, text included."""
        heads = 1 + max((head for row in self.config.per_head for head in dict(row)["heads"]), default=0)
        shares = []
        for one in self.config.fit(sequence.grid, heads):
            axes = axis_windows(sequence.grid, one.window, one.stride, one.dilation, one.causal)
            for item in range(sequence.batch or 1):
                text = _real_text(sequence.item(item))
                pairs = choose_tiles(axes, text).pairs + text * (text + sequence.tokens)
                shares.append(pairs / sequence.length**2)
        return sum(shares) / len(shares)


class GNA(Method):
    name = "gna"
    title = "Generalized neighborhood attention"
    kind = "sparse"
    paper = "arXiv 2504.16922"
    config_class = GNAConfig
    sites = frozenset({"self", "joint", "causal"})
    own_settings = frozenset({"window", "per_layer", "per_head"})

    def ladder(self, kind: SiteKind, grid: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
        if kind == "causal":
            return tuple({"window": max(grid[0] // part, 1)} for part in (2, 4, 8))
        half = (-1,) * (len(grid) - 2) + (0.5, 0.5)
        if len(grid) < 3:
            return {"window": (0.75,) * len(grid)}, {"window": (0.5,) * len(grid)}, {"window": (0.25,) * len(grid)}
        in_time = [{"window": (share, -1, -1)} for share in (0.5, 0.25)]
        return *in_time, {"window": half}, {"window": (0.5, 0.5, 0.5)}

    def on_heads(self, rows: Iterable[tuple[tuple[int, ...], Mapping[str, Any]]]) -> dict[str, Any] | None:
        rest: dict[str, Any] = {}
        per_head = []
        for heads, options in rows:
            if options.get("per_layer") or options.get("per_head"):
                return None
            per_head.append({"heads": list(heads), **{key: options[key] for key in SETTING if key in options}})
            rest |= {key: value for key, value in options.items() if key not in SETTING}
        return {**rest, "window": -1, "per_head": per_head}

    def processor(
        self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind = "self"
    ) -> Processor | None:
        assert isinstance(config, GNAConfig)  # patching makes it with config_class
        return _processor(config.for_layer(layer_index), kind == "causal")


@functools.lru_cache(maxsize=256)
def _processor(config: GNAConfig, causal: bool) -> Processor:
    """One object for equal settings: a compiled model needs a graph for each distinct one."""
    if not causal:
        return GNAProcessor(config)
    window = 4096 if config.window is None else config.window
    stride = 1 if config.stride == "auto" else config.stride
    return CausalWindowProcessor(dataclasses.replace(config, window=window, stride=stride))


def _hashable(value: Any) -> Any:
    """Rows may be written with lists; configs key caches."""
    return tuple(value) if isinstance(value, list) else value


def _real_text(sequence: Sequence) -> int:
    assert isinstance(sequence.valid_before, int) and isinstance(sequence.valid_after, int)
    return sequence.valid_before + sequence.valid_after


def _text(length: int, valid: Any, batch: int) -> Any:
    """`text_before` or `text_after` as the operator takes it."""
    if valid == length:
        return length
    return [[length, v] for v in (valid if isinstance(valid, tuple) else (valid,) * batch)]
