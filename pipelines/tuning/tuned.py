"""What continue-tuning found, and how it is told: a table, a JSON file, a picture of the losses."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNTUNED, SPARSE, DENSE = "untuned", "sparse-tuned", "dense-tuned"
COLOURS = {"dense": "tab:gray", "sparse": "tab:blue"}
WIDE = 1.96  # standard errors of half a 95 % interval
END = 4  # the losses at the end of a run are the mean of its last quarter


@dataclass(frozen=True)
class Tuned:
    """latents: (C, T, H, W) of a video. step_seconds: medians of forward and backward, "dense" and "sparse". losses: of
    every training step, by run. held_out: by how the model was run ("dense", "sparse"), then by model; one loss per
    video. kept: by model run sparse, the measures of `PatchHandle.measure` on those videos.
    """

    model: str
    method: str
    options: dict[str, Any]
    latents: tuple[int, ...]
    settings: dict[str, Any]
    processes: int
    step_seconds: dict[str, float]
    losses: dict[str, list[float]]
    held_out: dict[str, dict[str, list[float]]]
    kept: dict[str, dict[str, float | None]]
    environment: dict[str, str]

    @property
    def step_ratio(self) -> float:
        """How many times faster a sparse training step is than a dense one."""
        return self.step_seconds["dense"] / self.step_seconds["sparse"]

    def difference(self, sparse: str, dense: str) -> tuple[float, float]:
        """Held-out loss of the model `sparse` run sparse, less that of `dense` run dense: mean, and its standard error.

        Video by video, so that what is hard about a video does not count.
        """
        pairs = zip(self.held_out["sparse"][sparse], self.held_out["dense"][dense], strict=True)
        gaps = [a - b for a, b in pairs]
        return with_error(gaps)

    @property
    def models(self) -> list[str]:
        """Which models were judged, in the order to show them."""
        return [name for name in (UNTUNED, DENSE, SPARSE) if name in self.kept]

    def table(self) -> str:
        """Markdown: what each model came to, run dense and run sparse."""
        rows = [("", *self.models)]
        for way in ("dense", "sparse"):
            losses = self.held_out[way]
            rows.append(
                (f"held-out loss, run {way}", *(f"{statistics.mean(losses[name]):.4f}" for name in self.models))
            )
        for measure in ("density", "recall"):
            shares = [self.kept[name][measure] for name in self.models]
            rows.append((f"{measure}, run sparse", *("-" if share is None else f"{share:.1%}" for share in shares)))
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])

    def sentences(self) -> list[str]:
        """The figures beside the table, one line each."""
        seconds = self.step_seconds
        lines = [
            f"{self.method} on {self.model}; latents {'x'.join(map(str, self.latents))}",
            f"training step (forward and backward): dense {seconds['dense']:.3f} s, sparse {seconds['sparse']:.3f} s: "
            f"{self.step_ratio:.2f}x",
            f"sparse attention costs {_cost(self.difference(UNTUNED, UNTUNED))} held-out loss before tuning",
        ]
        if "dense" in self.losses:
            cost = _cost(self.difference(SPARSE, DENSE))
            end = {name: statistics.mean(rows[-max(1, len(rows) // END) :]) for name, rows in self.losses.items()}
            lines += [
                f"after tuning it costs {cost}, against dense tuning of the same length",
                f"training loss, last quarter of the steps: dense {end['dense']:.4f}, sparse {end['sparse']:.4f}",
            ]
        names = ("devices", "torch threads", "torch", "diffusers")
        return [*lines, "; ".join(f"{name} {self.environment[name]}" for name in names)]

    def save(self, folder: Path, name: str = "tuned") -> list[Path]:
        """Write `<name>.json` and `<name>.png`; returns their paths."""
        files = [folder / f"{name}.json", folder / f"{name}.png"]
        told = {**dataclasses.asdict(self), "step_ratio": self.step_ratio}
        files[0].write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        draw(self, files[1])
        return files


def with_error(gaps: Sequence[float]) -> tuple[float, float]:
    """Their mean and its standard error, nan of a single one."""
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    return statistics.mean(gaps), error


def with_interval(gaps: Sequence[float]) -> tuple[float, float]:
    """Their mean and half of its 95 % interval."""
    mean, error = with_error(gaps)
    return mean, WIDE * error


def smoothed(values: list[float], window: int) -> list[float]:
    """The mean of the values so far, at most the last `window` of them."""
    return [statistics.mean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def draw(tuned: Tuned, file: Path) -> None:
    """The training losses by step, thin, and their running means; their difference; the held-out losses."""
    from matplotlib.figure import Figure

    both = len(tuned.losses) == 2
    figure = Figure(figsize=(11 if both else 8, 3.4), layout="constrained")
    left, *middle, right = figure.subplots(1, 3 if both else 2, width_ratios=(4, 3, 3) if both else (4, 3))
    steps = range(1, tuned.settings["steps"] + 1)
    window = max(1, len(steps) // 10)
    for way, losses in sorted(tuned.losses.items()):
        left.plot(steps, losses, color=COLOURS[way], alpha=0.25, linewidth=0.8)
        left.plot(steps, smoothed(losses, window), color=COLOURS[way], label=f"{way} (mean of {window} steps)")
    left.set(xlabel="step", ylim=0, title="flow matching loss in training")
    left.legend(fontsize=8)
    for axes in middle:
        gaps = [a - b for a, b in zip(tuned.losses["sparse"], tuned.losses["dense"], strict=True)]
        axes.plot(steps, gaps, color=COLOURS["sparse"], alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(gaps, window), color=COLOURS["sparse"])
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel="step", title="sparse less dense, same batch")

    for offset, way in ((-0.2, "dense"), (0.2, "sparse")):
        heights = [statistics.mean(tuned.held_out[way][name]) for name in tuned.models]
        bars = right.bar([place + offset for place in range(len(heights))], heights, 0.38, color=COLOURS[way])
        bars.set_label(f"run {way}")
        right.bar_label(bars, fmt="%.3f", fontsize=7)
    labels = [name.replace("-", "-\n") for name in tuned.models]
    right.set(title="held-out loss", xticks=range(len(labels)), xticklabels=labels)
    right.margins(y=0.25)
    right.legend(fontsize=8, ncols=2)
    for axes in (left, *middle):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(file, dpi=110)


def _cost(difference: tuple[float, float]) -> str:
    mean, error = difference
    return f"{mean:+.4f} (standard error {error:.4f})"
