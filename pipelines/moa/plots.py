"""A search as pictures: the Pareto set, the spans by layer and head, and the influence of what a window hides."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attn_plugins.pipelines.comparing.measure_files import can_plot
from attn_plugins.search import grouped, hidden_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from attn_plugins.methods.moa import SpanPlan
    from attn_plugins.pipelines.moa_search import SearchResult

CURVES = 8  # most heads that are named on the influence plot
DPI = 130


def write(result: SearchResult, folder: Path) -> list[Path]:
    """Write pareto.png, spans.png and influence.png into `folder`; nothing without matplotlib."""
    if not can_plot():
        return []
    pictures = {"pareto": pareto(result), "spans": spans(result.plan, result.settings.bounded)}
    pictures["influence"] = influence(result)
    written = []
    for name, figure in pictures.items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=DPI)
    return written


def _figure(width: float, height: float) -> Figure:
    """No window, and none of the user's own pyplot state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def pareto(result: SearchResult) -> Figure:
    """Left: predicted losses of each plan by length. Right: what validation said of the same plans."""
    settings, best = result.settings, result.best
    figure = _figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    losses = np.array([choice.losses for choice in result.choices])
    scale = np.maximum(losses.max(axis=0), 1e-30)
    colours = [f"C{number % 10}" for number in range(len(losses))]
    for number, row in enumerate(losses / scale):
        style: dict[str, Any] = {"lw": 2.5, "zorder": 3} if number == best else {"lw": 1, "alpha": 0.7}
        left.plot(range(len(row)), row, "o-", color=colours[number], ms=4, **style)
    left.set_xticks(range(len(settings.lengths)), [f"{n:,}" for n in settings.lengths])
    left.set_xlabel("profiled length, tokens")
    left.set_ylabel("predicted loss / largest of the set")
    left.set_ylim(bottom=0)
    left.set_title(f"Pareto set at density {settings.density:g} ({len(losses)} plans)", fontsize=10)
    for number, one in enumerate(result.validated):
        chosen = number == best
        right.scatter(
            one.text, one.answers, color=colours[number], s=70 if chosen else 25, marker="*" if chosen else "o",
            zorder=3, label="chosen" if chosen else None,
        )  # fmt: skip
    right.scatter(result.dense.text, result.dense.answers, color="black", marker="x", label="dense")
    right.set_xlabel("running text, nats a token")
    right.set_ylabel("the dense model's answers, nats a token")
    right.set_title(f"at {settings.unseen:,} tokens, which were not profiled", fontsize=10)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def spans(plan: SpanPlan, lengths: tuple[int, ...]) -> Figure:
    """The share of the text that each head keeps, a map of layers by heads for each length."""
    layers, heads = plan.layers, plan.heads
    figure = _figure(min(max(1.1 + 0.42 * heads, 2.3), 6) * len(lengths), min(max(1.5 + 0.35 * layers, 2.8), 9))
    grid = figure.subplots(1, len(lengths), squeeze=False)[0]
    for axes, n in zip(grid, lengths, strict=True):
        kept = (plan.caches(n).clamp(max=n).double() / n).numpy()
        image = axes.imshow(kept, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(f"{n:,} tokens: {plan.density(n):.1%}", fontsize=9)
        axes.set_xlabel(f"{'KV' if plan.per == 'kv' else 'query'} head", fontsize=8)
        axes.set_xticks(range(0, heads, max(1, heads // 8)))
        axes.set_yticks(range(0, layers, max(1, layers // 16)))
        if layers * heads <= 64:
            for (layer, head), share in np.ndenumerate(kept):
                colour = "black" if share > 0.6 else "white"
                axes.text(head, layer, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=7)
    grid[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(grid), label="share of the text kept", pad=0.01)
    return figure


def influence(result: SearchResult) -> Figure:
    """Predicted loss of a window, by its size, of each KV head at the longest length; the largest ones by name."""
    settings, n = result.settings, result.settings.lengths[-1]
    layers, _, heads = result.options.shape
    maps = result.profile.maps(n)
    sizes = torch.arange(1, maps.shape[-1] + 1)
    each = hidden_loss(maps, sizes, sink=settings.sink // settings.block).flatten(0, 1)
    curves = grouped(each, layers * heads, dim=0).numpy()
    figure = _figure(7.5, 3.8)
    axes = figure.subplots()
    order = np.argsort(-curves[:, len(sizes) // 4])
    for place, item in enumerate(order):
        label = f"layer {item // heads}, KV head {item % heads}" if place < CURVES else None
        style: dict[str, Any] = {"color": f"C{place}", "lw": 1.6} if label else {"color": "0.7", "lw": 0.8}
        axes.plot(sizes * settings.block, np.maximum(curves[item], 1e-9), label=label, **style)
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(curves[:, :-1].max() * 1e-5, 1e-8))
    axes.set_xlabel("window, tokens")
    axes.set_ylabel("first-order loss of what it hides, nats a token")
    axes.set_title(f"influence by distance at {n:,} tokens, {settings.sink} sinks kept", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return figure
