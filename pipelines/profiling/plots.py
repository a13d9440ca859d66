"""A profile as pictures: heads as maps, attention by distance, groups of heads by example, the trend over steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attn_plugins.pipelines.comparing.measure_files import can_plot
from attn_plugins.pipelines.profiling.result import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
NAMED = 24  # most layers or heads that an axis of a map names
FRAMES = 8  # most frames of an example


def write(profile: Profile, folder: Path, keep: float) -> list[Path]:
    """Write heads.png, distance.png, groups.png and, of generations, steps.png; nothing without matplotlib."""
    if not can_plot():
        return []
    pictures = {"heads": heads(profile), "distance": distance(profile, keep), "groups": groups(profile)}
    if profile.steps > 1 and any(sums.kind != "causal" for sums in profile.layers.values()):
        pictures["steps"] = steps(profile)
    written = []
    for name, figure in pictures.items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=DPI)
    return written


def heads(profile: Profile) -> Figure:
    """Maps of layers by heads: importance (if it was measured), mean distance, entropy."""
    names = list(profile.layers)
    maps = {"mean distance, " + _unit(profile): profile.distance, "entropy, nats": profile.entropy}
    if profile.change:
        maps = {f"importance: {profile.importance_of}": lambda name: _known(profile.importance(name)), **maps}
    most = max(sums.heads for sums in profile.layers.values())
    figure = _figure(1.6 + len(maps) * min(max(2.6, 0.36 * most + 1.2), 5), min(max(2.2, 0.3 * len(names) + 1.2), 10))
    for axes, (title, read) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        values = np.full((len(names), most), np.nan)
        for row, name in enumerate(names):
            column = read(name).numpy()
            values[row, : len(column)] = column
        image = axes.imshow(values, aspect="auto", cmap="viridis")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("head", fontsize=8)
        axes.set_xticks(range(0, most, max(1, most // NAMED)))
        axes.set_yticks(range(0, len(names), max(1, len(names) // NAMED)))
        axes.tick_params(labelsize=7)
        figure.colorbar(image, ax=axes, pad=0.02).ax.tick_params(labelsize=7)
    figure.axes[0].set_ylabel("layer", fontsize=8)
    return figure


def distance(profile: Profile, keep: float) -> Figure:
    """The share of the mass within a distance, a curve for each layer: along each axis, or in tokens back."""
    axes_count = max(len(sums.axes) for sums in profile.layers.values())
    text = any(sums.kind == "causal" for sums in profile.layers.values())
    figure = _figure(max(4.6, 3.3 * axes_count + 1.2), 3.4)
    names = list(profile.layers)
    labels = {1: ("tokens back" if text else "tokens",), 2: ("rows", "columns"), 3: ("frames", "rows", "columns")}
    grid = figure.subplots(1, axes_count, squeeze=False, sharey=True)[0]
    for number, axes in enumerate(grid):
        for place, name in enumerate(names):
            sums = profile.layers[name]
            if number < len(sums.axes):
                mass = sums.axes[number].sum(0)
                held = (mass.cumsum(0) / mass.sum().clamp(min=1e-30)).numpy()
                colour = _colour(place, len(names))
                axes.plot(np.arange(len(held)) + (1 if text else 0), held, color=colour, lw=1.3, label=name)
        axes.axhline(keep, color="0.5", lw=0.8, ls="--")
        axes.set_xlabel(f"within so many {labels[axes_count][number]}", fontsize=8)
        axes.set_ylim(0, 1.02)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if text:
            axes.set_xscale("log", base=2)
    grid[0].set_ylabel("share of the attention mass", fontsize=8)
    if len(names) <= NAMED:
        figure.legend(*grid[0].get_legend_handles_labels(), fontsize=6, loc="outside right upper")
    return figure


def groups(profile: Profile) -> Figure:
    """Of each group of heads, what one query of its most typical head sees: a grid, frame by frame, or a text."""
    found = profile.clusters
    figure = _figure(8.5, 0.4 + 1.25 * len(found))
    for axes, cluster in zip(figure.subplots(len(found), 1, squeeze=False)[:, 0], found, strict=True):
        name, head = cluster.heads[0]
        sums = profile.layers[name]
        assert sums.picture is not None  # a layer of a profile has rows
        _example(axes, sums.picture[head])
        title = f"{cluster.title}: {len(cluster.heads)} heads, such as {name}/{head} (query {sums.shown_at:,})"
        axes.set_title(title, fontsize=8, loc="left")
    if any(sums.kind == "causal" for sums in profile.layers.values()):
        figure.supxlabel("key", fontsize=8)
        figure.supylabel("weight (logarithmic above 0.001)", fontsize=8)
    return figure


def steps(profile: Profile) -> Figure:
    """Entropy and distance of each layer over the steps of a generation."""
    figure = _figure(9, 3.2)
    names = list(profile.layers)
    for axes, what in zip(figure.subplots(1, 2), ("entropy", "distance"), strict=True):
        for place, name in enumerate(names):
            rows = profile.by_step(name, what)
            axes.plot(list(rows), list(rows.values()), color=_colour(place, len(names)), lw=1.3, label=name)
        axes.set_xlabel("step", fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title("entropy, nats" if what == "entropy" else f"mean distance, {_unit(profile)}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    if len(names) <= NAMED:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=6, loc="outside right upper")
    return figure


def _example(axes: Axes, weights: torch.Tensor) -> None:
    if weights.ndim == 1:
        axes.fill_between(range(len(weights)), weights.numpy(), lw=0)
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.tick_params(labelsize=6)
        return
    frames = weights[None] if weights.ndim == 2 else weights[:: -(-len(weights) // FRAMES)]
    gap = torch.full((*frames.shape[:2], 1), float("nan"))
    strip = torch.cat([torch.cat([frame, space], dim=1) for frame, space in zip(frames, gap, strict=True)], dim=1)
    axes.imshow(strip.sqrt().numpy(), cmap="magma", aspect="equal")
    axes.set_axis_off()


def _known(values: torch.Tensor | None) -> torch.Tensor:
    assert values is not None  # measured for all layers or for none
    return values


def _unit(profile: Profile) -> str:
    return "tokens back" if all(sums.kind == "causal" for sums in profile.layers.values()) else "hops"


def _colour(place: int, count: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"](place / max(count - 1, 1) * 0.92)


def _figure(width: float, height: float) -> Figure:
    """No window, and none of the user's own pyplot state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
