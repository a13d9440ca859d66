"""Plots of a result file: useful operations a second by length, a panel for each mask, a line for each backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attn_plugins.pipelines.benching.backends.registry import BACKENDS
from attn_plugins.pipelines.benching.masks import MASKS
from attn_plugins.pipelines.benching.results import Row
from attn_plugins.pipelines.benching.table import UNITS, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS, WIDTH, HEIGHT, DPI = 5, 2.7, 2.3, 110
GROUP = ("machine", "threads", "dtype", "head_dim", "heads", "kv_heads", "batch", "direction")


def write(rows: Sequence[Row], stem: Path) -> list[Path]:
    """A picture for each group of rows that differ in mask, backend and length alone; what was written.

    `stem`: path without suffix. One group is `<stem>.png`, several are `<stem>_<dtype>_<direction>.png`, numbered
    where these are alike.

    Raises:
        ImportError: without matplotlib.
    """
    groups = list(dict.fromkeys(tuple(str(row[name]) for name in GROUP) for row in rows))
    written: list[Path] = []
    for group in groups:
        some = [row for row in rows if tuple(str(row[name]) for name in GROUP) == group]
        name = f"{stem.name}_{group[2]}_{group[7].replace('+', '_')}" if len(groups) > 1 else stem.name
        path = stem.with_name(f"{name}.png")
        if path in written:
            path = stem.with_name(f"{name}_{len(written)}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure(some).savefig(path, dpi=DPI)
        written.append(path)
    return written


def figure(rows: Sequence[Row]) -> Figure:
    """Rows of one group."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    masks = [name for name in MASKS if any(row["mask"] == name and number(row, "ms") > 0 for row in rows)]
    ran = [name for name in BACKENDS if any(row["backend"] == name and number(row, "ms") > 0 for row in rows)]
    lines = max(1, math.ceil(len(masks) / COLUMNS))
    drawn = Figure(figsize=(COLUMNS * WIDTH, lines * HEIGHT + 0.6), layout="constrained")
    FigureCanvasAgg(drawn)
    grid = drawn.subplots(lines, COLUMNS, squeeze=False).flatten()
    for axes in grid[len(masks) :]:
        axes.set_axis_off()
    for axes, mask in zip(grid, masks, strict=False):
        _panel(axes, mask, [row for row in rows if row["mask"] == mask], ran)
    handles = {label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(ran), fontsize=8)
    if rows:
        row = rows[0]
        drawn.suptitle(
            f"useful Gflop/s by tokens: {UNITS[str(row['direction'])]}, {row['dtype']}, {row['heads']} heads of "
            f"{row['head_dim']}, {row['machine']}, {row['threads']} threads",
            fontsize=9,
        )
    return drawn


def _panel(axes: Axes, mask: str, rows: Sequence[Row], ran: Sequence[str]) -> None:
    for place, backend in enumerate(ran):
        mine = sorted(
            (row for row in rows if row["backend"] == backend and number(row, "ms") > 0),
            key=lambda row: number(row, "tokens"),
        )
        if mine:
            style = {"lw": 2.0, "zorder": 3} if backend.startswith("ours") else {"lw": 1.1}
            tokens, rate = ([number(row, name) for row in mine] for name in ("tokens", "useful_gflops"))
            axes.plot(tokens, rate, "o-", ms=3, color=f"C{place}", label=backend, **style)  # type: ignore[arg-type]
    axes.set_title(mask, fontsize=8)
    axes.set_xscale("log", base=2)
    ticks = sorted({int(number(row, "tokens")) for row in rows})
    axes.set_xticks(ticks, [f"{n >> 10}k" if n % 1024 == 0 else str(n) for n in ticks])
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
