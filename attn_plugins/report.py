"""What a patch is worth, in plain text: sites, density, FLOPs saved, and the bound that the rest of the model sets.

The sizes are those of the model's last forward; before the first one only sites and settings can be told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from attn_plugins import registry, weights
from attn_plugins.metrics.flops import step_flops
from attn_plugins.plan.simulator import end_to_end
from attn_plugins.runtime import device_of
from attn_plugins.schedule import describe
from attn_plugins.sequence import Sequence

if TYPE_CHECKING:
    from attn_plugins.handle import PatchHandle
    from attn_plugins.method import Processor
    from attn_plugins.record import Patched
    from attn_plugins.runtime import Layer

ASSUMPTION = (
    "estimated from shapes: every linear layer of the patched blocks on the tokens of its stream; embedders, "
    "modulation and cross-attention scores left out; time taken as proportional to FLOPs"
)


@dataclass(frozen=True)
class SiteGroup:
    """Sites that share a kind and a processor. FLOPs are per forward and batch item; None where they cannot be told."""

    kind: str
    names: tuple[str, ...]
    config: str
    density: float | None
    dense_flops: float | None


@dataclass(frozen=True)
class RootReport:
    """One patched model at the shape of its last forward (`sequence` None: it has not run).

    `weights`: numbers that the method added to the model.
    """

    root: str
    patched: Patched
    sequence: Sequence | None
    groups: tuple[SiteGroup, ...]
    share: float | None
    dense_share: float | None
    weights: int = 0

    @property
    def saved(self) -> float | None:
        """Share of the patched sites' FLOPs that a sparse step saves."""
        rows = [(group.dense_flops, group.density) for group in self.groups]
        total = sum(flops for flops, _ in rows if flops)
        if not total or any(flops is None or density is None for flops, density in rows):
            return None
        return sum(flops * (1 - density) for flops, density in rows if flops and density is not None) / total

    def gain(self, speedup: float) -> float | None:
        """Gain of the whole schedule if the patched sites ran `speedup` times faster in the sparse steps."""
        if self.share is None or self.dense_share is None:
            return None
        return end_to_end(speedup, self.share * (1 - self.dense_share))


def analyse(handle: PatchHandle) -> list[RootReport]:
    """One report per patched model that still exists."""
    pairs = [(ref(), patched) for ref, patched in zip(handle._roots, handle.patches, strict=True)]
    return [_analyse(root, patched) for root, patched in pairs if root is not None]


def summarise(handle: PatchHandle) -> str:
    """The table that `handle.summary()` gives."""
    lines = [line for row in analyse(handle) for line in _summary(row)] or [
        f"{handle.method}: the patched model is gone"
    ]
    if handle.measures is not None:
        lines.append(f"  {handle.measures.summary()}")
    return "\n".join(lines)


def explain(handle: PatchHandle) -> str:
    """The table, each site by name, each site that stays dense with the reason, and what the numbers assume."""
    lines = []
    for row in analyse(handle):
        lines += _summary(row)
        for group in row.groups:
            lines += [
                f"  sparse  {name}  ({group.kind}, {_measure(row.patched)} {_percent(group.density)})"
                for name in group.names
            ]
        lines += [f"  dense   {name}  ({why})" for name, why in row.patched.skipped]
        lines += [f"  dense so far because {reason}" for reason in sorted(row.patched.state.warned)]
    return "\n".join([*lines, f"FLOPs are {ASSUMPTION}."])


def _summary(row: RootReport) -> list[str]:
    patched = row.patched
    preset = f", preset {patched.preset}" if patched.preset else ""
    total = len(patched.layers) + len(patched.skipped)
    head = ("kind", "sites", "grid", _measure(patched), "GFLOPs dense", "saved", "settings")
    rows = table([head, *(_cells(group, row.sequence) for group in row.groups)])
    title = f"{patched.method} on {row.root} ({patched.family}{preset}): {len(patched.layers)} of {total} sites"
    return [title, *(f"  {line}" for line in [*rows, *_totals(row)])]


def table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Cells as aligned lines, two spaces between columns."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _analyse(root: nn.Module, patched: Patched) -> RootReport:
    state = patched.state
    sequence = state.last_sequence
    flops = None
    if sequence is not None:
        family = registry.family_of(root)
        found = [(site.name, site.kind) for site in family.find_sites(root)] if family else []
        flops = step_flops(root, found or [(layer.name, layer.kind) for layer in patched.layers], sequence)
    groups: dict[tuple[str, type, Any], list[Layer]] = {}
    for layer in patched.layers:
        same = getattr(layer.processor, "config", id(layer.processor))
        groups.setdefault((layer.kind, type(layer.processor), same), []).append(layer)
    rows = []
    for (kind, _, _), layers in groups.items():
        dense_flops = None
        if flops is not None and all(layer.name in flops.attention for layer in layers):
            dense_flops = sum(flops.attention[layer.name] for layer in layers)
        names = tuple(layer.name for layer in layers)
        rows.append(
            SiteGroup(
                kind, names, _settings(layers[0].processor, patched), _density(root, layers[0], sequence), dense_flops
            )
        )
    share = None
    if flops is not None and flops.linear is not None and all(row.dense_flops is not None for row in rows):
        mine = sum(row.dense_flops or 0.0 for row in rows)
        share = mine / (sum(flops.attention.values()) + flops.linear)
    added = sum(weight.numel() for _, weight in weights.named_weights(root, patched))
    dense_share = patched.state.schedule.dense_share
    return RootReport(type(root).__name__, patched, sequence, tuple(rows), share, dense_share, added)


def _density(root: nn.Module, layer: Layer, sequence: Sequence | None) -> float | None:
    if sequence is None:
        return None
    if sequence.tokens < layer.root.least_tokens(device_of(root)):
        return 1.0
    return layer.processor.density(Sequence(sequence.grid) if layer.kind == "self" else sequence)


def _measure(patched: Patched) -> str:
    """What `density` is the share of: pairs that are computed, or of dense attention's cost where none is left out."""
    return patched.layers[0].processor.measure


def _settings(processor: Processor, patched: Patched) -> str:
    """The config of the processor (a per-layer one, where it has its own), as one would type it."""
    config = getattr(processor, "config", None)
    options = getattr(config, "to_options", patched.config.to_options)()
    return " ".join(f"{key}={_typed(value)}" for key, value in options.items() if key not in ("base_size", "per_layer"))


def _typed(value: Any) -> str:
    flat = isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value)
    return "x".join(str(int(item)) for item in value) if flat else str(value)


def _cells(group: SiteGroup, sequence: Sequence | None) -> tuple[str, ...]:
    saved = None
    if group.dense_flops is not None and group.density is not None:
        saved = group.dense_flops * (1 - group.density)
    return (
        group.kind, str(len(group.names)), _shape(sequence), _percent(group.density),
        _giga(group.dense_flops), _giga(saved), group.config or "defaults",
    )  # fmt: skip


def _totals(row: RootReport) -> list[str]:
    schedule = row.patched.state.schedule
    lines = [f"weights of its own: {row.weights:,}"] if row.weights else []
    if not schedule.always_sparse:
        lines.append(f"dense: {describe(schedule)}")
    if row.sequence is None:
        return lines + [f"{_measure(row.patched)} and bounds: run the model once, they depend on its shape"]
    if row.share is None:
        return lines + [
            "bound: unknown from shapes (not made of linear layers alone); `attn-plugins compare` measures it"
        ]
    lines.append(f"share of these sites in a dense forward: {row.share:.1%} of the FLOPs")
    bound = row.gain(math.inf)
    if bound is None:
        return lines + ["bound: needs the number of steps (num_steps=...)"]
    text = f"bound for the whole schedule (Amdahl): {bound:.2f}x"
    left = 1 - row.saved if row.saved is not None else None
    if left:
        text += f"; at this {_measure(row.patched)} at most {row.gain(1 / left):.2f}x"
    return [*lines, text]


def _shape(sequence: Sequence | None) -> str:
    if sequence is None:
        return "?"
    text = sequence.text_before + sequence.text_after
    return "x".join(map(str, sequence.grid)) + (f" + {text} text" if text else "")


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{value:.1%}"


def _giga(value: float | None) -> str:
    return "?" if value is None else f"{value / 1e9:.3g}"
