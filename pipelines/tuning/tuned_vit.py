"""What continue-tuning of a vision transformer found: a table, a JSON file, a picture."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_plugins.pipelines.tuning.tuned import smoothed, with_error

# what was judged, in the order to show it
DENSE, FREE, SWAPPED, TUNED, CONTROL = (
    "dense, as it came", "agents without training", "agents after the swap", "agents, tuned", "dense, tuned as long",
)  # fmt: skip
COLOURS = {"agents": "tab:blue", "dense": "tab:gray"}


@dataclass(frozen=True)
class Speed:
    """Medians in seconds of a forward of `batch` pictures of `size` px, `tokens` patches each, at most `most` apart."""

    size: int
    tokens: int
    batch: int
    dense: float
    agents: float

    @property
    def ratio(self) -> float:
        return self.dense / self.agents


@dataclass(frozen=True)
class TunedVit:
    """hits: by what was judged, whether each of the same held-out pictures was told right. losses: of every training
    step, by run ("agents", "dense"). weights: how many numbers the method added, and how many the model has without.
    """

    model: str
    options: dict[str, Any]
    data: str
    settings: dict[str, Any]
    processes: int
    weights: tuple[int, int]
    hits: dict[str, list[bool]]
    losses: dict[str, list[float]]
    speeds: list[Speed]
    environment: dict[str, str]

    def accuracy(self, name: str) -> tuple[float, float]:
        """Share told right, and its standard error."""
        hits = self.hits[name]
        share = statistics.mean(hits)
        return share, math.sqrt(share * (1 - share) / len(hits))

    def difference(self, name: str, other: str) -> tuple[float, float]:
        """Accuracy of one less that of another, picture by picture, and its standard error."""
        gaps = [int(a) - int(b) for a, b in zip(self.hits[name], self.hits[other], strict=True)]
        return with_error(gaps)

    def table(self) -> str:
        """Markdown: accuracies, then speeds."""
        lines = ["| | accuracy | less than dense, as it came |", "|---|---|---|"]
        for name in self.hits:
            share, error = self.accuracy(name)
            gap, gap_error = self.difference(name, DENSE)
            beside = "-" if name == DENSE else f"{-gap:+.1%} ± {gap_error:.1%}"
            lines.append(f"| {name} | {share:.1%} ± {error:.1%} | {beside} |")
        lines += ["", "| picture | tokens | pictures at once | dense | agents | |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {row.size} px | {row.tokens:,} | {row.batch} | {1000 * row.dense:.1f} ms | {1000 * row.agents:.1f} ms "
            f"| {row.ratio:.2f}x |"
            for row in self.speeds
        ]
        return "\n".join(lines)

    def sentences(self) -> list[str]:
        """The figures beside the tables, one line each."""
        added, before = self.weights
        lines = [
            f"{self.model}; {self.data}",
            f"agents add {added:,} weights to {before:,} ({added / before:.1%}); options {self.options or 'default'}",
            f"{self.settings['steps']} steps of {self.settings['batch'] * self.processes} pictures; accuracy of "
            f"{len(self.hits[DENSE])} held-out pictures, ± one standard error",
        ]
        if CONTROL in self.hits:
            gap, error = self.difference(TUNED, CONTROL)
            lines.append(f"agents, tuned, less dense, tuned as long: {gap:+.1%} ± {error:.1%}, picture by picture")
        names = ("devices", "torch threads", "torch", "transformers")
        return [*lines, "; ".join(f"{name} {self.environment[name]}" for name in names)]

    def save(self, folder: Path, name: str = "tuned") -> list[Path]:
        """Write `<name>.json` and `<name>.png`; returns their paths."""
        files = [folder / f"{name}.json", folder / f"{name}.png"]
        told = dataclasses.asdict(self) | {"accuracy": {name: self.accuracy(name)[0] for name in self.hits}}
        files[0].write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        draw(self, files[1])
        return files


def draw(tuned: TunedVit, file: Path) -> None:
    """Training losses by step; accuracies; speeds by the size of the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    steps = range(1, tuned.settings["steps"] + 1)
    window = max(1, len(steps) // 20)
    for way, losses in sorted(tuned.losses.items()):
        left.plot(steps, losses, color=COLOURS[way], alpha=0.2, linewidth=0.8)
        left.plot(steps, smoothed(losses, window), color=COLOURS[way], label=f"{way} (mean of {window} steps)")
    left.set(xlabel="step", ylim=0, title="cross-entropy in training")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=8)

    names = list(tuned.hits)
    shares, errors = zip(*(tuned.accuracy(name) for name in names), strict=True)
    colours = [COLOURS["dense" if name.startswith("dense") else "agents"] for name in names]
    bars = middle.barh(range(len(names)), shares, xerr=errors, color=colours)
    middle.bar_label(bars, labels=[f"{share:.1%}" for share in shares], padding=3, fontsize=8)
    middle.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1.18), title="accuracy, held-out pictures")
    middle.invert_yaxis()

    places = range(len(tuned.speeds))
    for offset, way in ((-0.2, "dense"), (0.2, "agents")):
        times = [1000 * getattr(row, way) / row.batch for row in tuned.speeds]
        right.bar([place + offset for place in places], times, 0.38, color=COLOURS[way], label=way)
    for place, row in zip(places, tuned.speeds, strict=True):
        top = 1000 * max(row.dense, row.agents) / row.batch
        right.annotate(f"{row.ratio:.2f}x", (place, top), ha="center", va="bottom", fontsize=8)
    labels = [f"{row.size} px" for row in tuned.speeds]
    right.set(yscale="log", xticks=list(places), xticklabels=labels, title="ms a picture (forward)")
    right.margins(y=0.2)
    right.legend(fontsize=8, loc="upper left")
    figure.savefig(file, dpi=110)
