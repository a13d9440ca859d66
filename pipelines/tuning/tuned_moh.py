"""What continue-tuning of a mixture of heads found: a table, a JSON file, a picture."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_plugins.pipelines.tuning.tuned import smoothed, with_interval
from attn_plugins.training.routers import RouterRow, table
from attn_plugins.training.tasks import shown

# what was judged, in the order to show it
DENSE, UNTRAINED, NORMS, PRUNED, CALIBRATED, TUNED, CONTROL = (
    "dense, as it came", "learned router, untrained", "query norms, untrained", "the same heads for all tokens",
    "calibrated router", "mixture, tuned", "dense, tuned as long",
)  # fmt: skip
ORDER = (DENSE, UNTRAINED, NORMS, PRUNED, CALIBRATED, TUNED, CONTROL)
COLOURS = {"moh": "tab:blue", "dense": "tab:gray"}


@dataclass(frozen=True)
class TunedMoH:
    """held_out: by what was judged, per seed, the loss on each of the same held-out items. losses: of every training
    step, by run ("moh", "dense"). routers: what those of the tuned mixture did on the held-out items. weights: how many
    numbers the method added, and how many the model has without.
    """

    model: str
    options: dict[str, Any]
    task: str
    unit: str
    settings: dict[str, Any]
    seeds: list[int]
    processes: int
    weights: tuple[int, int]
    held_out: dict[str, list[list[float]]]
    losses: dict[str, list[float]]
    routers: list[RouterRow]
    environment: dict[str, str]

    @property
    def names(self) -> list[str]:
        return [name for name in ORDER if name in self.held_out]

    def loss(self, name: str) -> tuple[float, list[float]]:
        """The mean, and that of every seed."""
        each = [statistics.mean(losses) for losses in self.held_out[name]]
        return statistics.mean(each), each

    def difference(self, name: str, other: str) -> tuple[float, float]:
        """Loss of one less that of another, item by item, and half of its 95 % interval: over the items, each the mean
        of its seeds, so that what is hard about an item does not count."""
        means = ([statistics.mean(item) for item in zip(*self.held_out[one], strict=True)] for one in (name, other))
        gaps = [a - b for a, b in zip(*means, strict=True)]
        return with_interval(gaps)

    def shown(self, loss: float) -> float:
        return shown(self.unit, loss)

    def table(self) -> str:
        """Markdown."""
        lines = [f"| | {self.unit} | of the seeds | loss less than dense's, as it came |", "|---|---|---|---|"]
        for name in self.names:
            loss, each = self.loss(name)
            gap, error = self.difference(name, DENSE)
            spread = f"{self.shown(min(each)):.3f} - {self.shown(max(each)):.3f}" if len(each) > 1 else ""
            beside = "-" if name == DENSE else f"{gap:+.4f} ± {error:.4f}"
            lines.append(f"| {name} | {self.shown(loss):.3f} | {spread} | {beside} |")
        return "\n".join(lines)

    def sentences(self) -> list[str]:
        """The figures beside the table, one line each."""
        added, before = self.weights
        lines = [
            f"{self.model}; {self.task}",
            f"routers add {added:,} numbers to {before:,} ({added / before:.1%}); moh {self.options or 'default'}",
            f"{len(self.held_out[DENSE][0])} held-out items, ± half of a 95 % interval over them; "
            f"{self.settings['steps']} steps of {self.settings['batch'] * self.processes} items",
        ]
        for name, other in ((CALIBRATED, PRUNED), (CALIBRATED, UNTRAINED), (TUNED, CALIBRATED), (TUNED, CONTROL)):
            if name in self.held_out and other in self.held_out:
                gap, error = self.difference(name, other)
                lines.append(f"loss of {name!r} less that of {other!r}: {gap:+.4f} ± {error:.4f}")
        names = ("devices", "torch threads", "torch", "transformers")
        return [*lines, "; ".join(f"{name} {self.environment[name]}" for name in names), "", *table(self.routers)]

    def save(self, folder: Path, name: str = "tuned") -> list[Path]:
        """Write `<name>.json` and `<name>.png`; returns their paths."""
        files = [folder / f"{name}.json", folder / f"{name}.png"]
        told = dataclasses.asdict(self) | {
            self.unit: {name: self.shown(self.loss(name)[0]) for name in self.names},
            "routers": [row._asdict() for row in self.routers],
        }
        files[0].write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        draw(self, files[1])
        return files


def draw(tuned: TunedMoH, file: Path) -> None:
    """Losses in training; held-out losses; how often each layer's router gave its units to tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 4, 4))
    for way, losses in sorted(tuned.losses.items()):
        window = max(1, len(losses) // 20)
        steps = range(1, len(losses) + 1)
        left.plot(steps, losses, color=COLOURS[way], alpha=0.2, linewidth=0.8)
        left.plot(steps, smoothed(losses, window), color=COLOURS[way], label=f"{way} (mean of {window} steps)")
    left.set(xlabel="step", title="loss in training")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=8)

    values = [tuned.shown(tuned.loss(name)[0]) for name in tuned.names]
    colours = [COLOURS["dense" if name.startswith("dense") else "moh"] for name in tuned.names]
    bars = middle.barh(range(len(values)), values, color=colours)
    middle.bar_label(bars, labels=[f"{value:.3f}" for value in values], padding=3, fontsize=8)
    low, high = min(values), max(values)
    middle.set(yticks=range(len(values)), title=f"{tuned.unit}, held-out items")
    middle.set_yticklabels(tuned.names)
    middle.set_xlim(max(0.0, low - 0.5 * (high - low)), high + 0.25 * (high - low) + 1e-9)
    middle.invert_yaxis()
    _loads(figure, right, tuned.routers)
    figure.savefig(file, dpi=110)


def _loads(figure: Any, axes: Any, rows: list[RouterRow]) -> None:
    """A row a layer, a cell a routed unit; beside it the layer's entropy, and its dead units."""
    if not rows:
        axes.set_axis_off()
        return
    widest = max(len(row.load) for row in rows)
    cells = [[*row.load, *[math.nan] * (widest - len(row.load))] for row in rows]
    shown = axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    figure.colorbar(shown, ax=axes, label="share of the tokens")
    labels = [f"{place}: entropy {row.entropy:.2f}, {row.dead} dead" for place, row in enumerate(rows)]
    axes.set(xlabel="routed unit", ylabel="layer", title="what the routers chose", yticks=range(len(rows)))
    axes.set_yticklabels(labels, fontsize=8)
