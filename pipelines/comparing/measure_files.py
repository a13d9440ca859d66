"""A comparison's numbers as files: its steps and layers as CSV, and a plot of them."""

from __future__ import annotations

import csv
import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_plugins.measures import NAMES, mean

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from attn_plugins.pipelines.comparing.comparison import Comparison

DPI = 130
ROW = 0.16  # inches of a layer on the heat maps
SHOWN = 40  # most layers that are named there


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def write(comparison: Comparison, folder: Path, name: str) -> list[Path]:
    """Write `<name>_steps.csv`, `<name>_layers.csv` if layers were measured, and, with matplotlib, `<name>_steps.png`.

    Returns what was written; `folder` is made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [_steps(comparison, folder / f"{name}_steps.csv")]
    if comparison.measures is not None and comparison.measures.layer_steps:
        written.append(comparison.measures.save(folder / f"{name}_layers.csv"))
    if can_plot():
        written.append(plot(comparison, folder / f"{name}_steps.png"))
    return written


def _steps(comparison: Comparison, path: Path) -> Path:
    """A row per step: PSNR in dB (inf: equal), the floor beside it, and the means over the layers."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "relative_l2", "latent_psnr", "floor_psnr", "floor_bit_identical", *NAMES))
        for step in range(comparison.steps):
            measured = comparison.measured_in(step)
            values = [mean(getattr(row, name) for row in measured) for name in NAMES]
            likeness, noise = comparison.likeness, comparison.noise
            numbers = (likeness.drift[step].relative_l2, likeness.latent_psnr[step], noise.latent_psnr[step])
            cells = ["" if value is None else f"{value:.6g}" for value in (*numbers, *values)]
            writer.writerow((step, *cells[:3], noise.identical[step], *cells[3:]))
    return path


def plot(comparison: Comparison, path: Path) -> Path:
    """Latent PSNR by step with the dense-against-dense floor; above it recall and relative L1 by layer and step."""
    figure(comparison).savefig(path, dpi=DPI)
    return path


def figure(comparison: Comparison) -> Figure:
    """What `plot` draws."""
    measures = comparison.measures
    maps = [] if measures is None else [name for name in ("recall", "relative_l1") if _known(measures.grid(name))]
    layers = len(measures.layers) if measures is not None else 0
    high = min(max(ROW * layers, 1.6), 6.0)
    drawn = canvas(9, 3.2 + high * len(maps))
    axes = drawn.subplots(
        len(maps) + 1, 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": [*[high] * len(maps), 2.6]}
    )[:, 0]
    for name, ax in zip(maps, axes, strict=False):
        _heat_map(comparison, name, ax)
    _curve(comparison, axes[-1])
    drawn.suptitle(f"{comparison.method} on {comparison.model}, against dense", fontsize=11)
    return drawn


def canvas(width: float, height: float) -> Figure:
    """An empty figure, inches, with no window and none of the user's own pyplot state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn


def _known(grid: torch.Tensor) -> bool:
    return bool((~grid.isnan()).any())


def _heat_map(comparison: Comparison, name: str, ax: Axes) -> None:
    measures = comparison.measures
    assert measures is not None  # there would be no map
    grid = measures.grid(name)[:, -comparison.steps :]
    share = name == "recall"
    limits: dict[str, Any] = {"vmin": 0, "vmax": 1 if share else float(grid.nan_to_num(0).max())}
    image = ax.imshow(grid.numpy(), aspect="auto", cmap="viridis" if share else "magma", **limits)
    ax.set_facecolor("0.88")
    title = (
        "recall: share of the dense attention weights that is kept" if share else "relative L1 of attention's output"
    )
    ax.set_title(f"{title} (grey: dense)", fontsize=9)
    every = max(1, math.ceil(len(measures.layers) / SHOWN))
    places = range(0, len(measures.layers), every)
    ax.set_yticks(places, [measures.label(*measures.layers[place]) for place in places], fontsize=6)
    ax.figure.colorbar(image, ax=ax, pad=0.01)


def _curve(comparison: Comparison, ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = range(comparison.steps)
    noise = comparison.noise
    ax.plot(steps, _finite(comparison.likeness.latent_psnr), "o-", ms=3, label=comparison.method)
    if all(noise.identical):
        ax.plot([], [], color="0.5", ls="--", label="dense again: bit-identical")
    else:
        ax.plot(steps, _finite(noise.latent_psnr), "o--", ms=3, color="0.5", label="dense again (noise floor)")
    dense = [step for step in steps if comparison.measures is not None and not comparison.measured_in(step)]
    for step in dense:
        ax.axvspan(step - 0.5, step + 0.5, color="0.88", lw=0, label="dense steps" if step == dense[0] else None)
    ax.set_xlim(-0.5, comparison.steps - 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("step")
    ax.set_ylabel("dB")
    ax.set_title("PSNR of the latents after each step, over the dense latents' range (none: equal)", fontsize=9)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def _finite(values: tuple[float, ...]) -> list[float]:
    return [math.nan if math.isinf(value) else value for value in values]
