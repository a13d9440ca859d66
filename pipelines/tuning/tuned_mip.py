"""What training MIP found: a table, a JSON file, a sheet of pictures, and the losses."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attn_plugins.pipelines.tuning.tuned import WIDE, smoothed, with_error
from attn_plugins.training.two_objects import TwoObjects

# what was judged, in the order to show it
STOCK, MEAN, FREE, TRAINED = "stock adapter", "uniform mean", "training-free merge", "trained"
SHOWN, ENLARGED = 8, 3  # pairs of the sheet, and px of its pictures for one of theirs


@dataclass
class Judged:
    """Of one way to use the adapter, on the same held-out pairs.

    dices: of w_i against the object's mask, "picture" and "objects", one a pair; {} where there is no w. lower: 1 where
    the loss is lower with the references in order than swapped, 0, or 0.5 of a tie. right: of the two pictures of each
    drawn pair, whether each object has its own looks; None where not both are to be found. pictures: those,
    (2, 3, H, W) in 0..1.
    """

    dices: dict[str, list[float]]
    lower: list[float]
    right: list[list[list[float] | None]]
    pictures: list[torch.Tensor] = field(default_factory=list)

    @property
    def accuracy(self) -> tuple[float, float] | None:
        """Swap accuracy, and its standard error over the pairs that could be read; None without any."""
        return _mean([one for one in self.by_pair if one is not None])

    @property
    def by_pair(self) -> list[float | None]:
        """Share of its objects that have their own looks, in those of its pictures that could be read."""
        flat = [[one for some in pair if some is not None for one in some] for pair in self.right]
        return [statistics.mean(some) if some else None for some in flat]

    def told(self) -> dict[str, Any]:
        return {"dices": self.dices, "lower": self.lower, "right": self.right, "swap accuracy": self.accuracy}


@dataclass
class TunedMIP:
    """settings: of the run. weights: how many numbers were trained. judged: by the way it was used. pairs: what was to
    be drawn."""

    model: str
    data: str
    settings: dict[str, Any]
    processes: int
    weights: int
    losses: list[float]
    judged: dict[str, Judged]
    environment: dict[str, str]
    pairs: list[TwoObjects] = field(default_factory=list)

    def table(self) -> str:
        """Markdown; ± is half of a 95 % interval over the pairs."""
        lines = [
            "| | swap accuracy | pictures with both objects | loss tells the order | Dice of w | Dice on the objects |",
            "|---|---|---|---|---|---|",
        ]
        for name, one in self.judged.items():
            read = [some is not None for pair in one.right for some in pair]
            drawn = f"{sum(read)} of {len(read)}" if read else "-"
            cells = [_share(one.accuracy), drawn, _share(_mean(one.lower))]
            cells += [_number(_mean(one.dices.get(which, []))) for which in ("picture", "objects")]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def sentences(self) -> list[str]:
        """The figures beside the table, one line each."""
        settings = self.settings
        last = self.losses[-max(1, len(self.losses) // 4) :]
        lines = [
            f"{self.model}; {self.data}",
            f"{settings['steps']} steps of {settings['batch'] * self.processes} pictures, {self.weights:,} weights; "
            f"loss of the last quarter {statistics.mean(last):.4f}",
        ]
        read = [self.judged[name].by_pair for name in (TRAINED, FREE) if name in self.judged]
        if len(read) == 2:
            gaps = [a - b for a, b in zip(*read, strict=True) if a is not None and b is not None]
            if len(gaps) > 1:
                gap, error = with_error(gaps)
                lines.append(f"{TRAINED} less {FREE}: {gap:+.1%} ± {WIDE * error:.1%} swap accuracy, pair by pair")
        names = ("devices", "torch threads", "torch", "diffusers")
        return [*lines, "; ".join(f"{name} {self.environment[name]}" for name in names if name in self.environment)]

    def save(self, folder: Path, name: str = "tuned") -> list[Path]:
        """Write `<name>.json`, `<name>.png` of the losses and `<name>_sheet.png`, if anything was drawn."""
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{name}.json", folder / f"{name}.png"]
        told = {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}
        told |= {"judged": {way: one.told() for way, one in self.judged.items()}, "pairs": None}
        files[0].write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        draw_losses(self.losses, files[1])
        if self.pairs:
            files.append(folder / f"{name}_sheet.png")
            sheet(self).save(files[-1])
        return files


def sheet(tuned: TunedMIP, shown: int = SHOWN) -> Any:
    """A row a pair: two references, then two pictures of each way: with these references, and with looks swapped."""
    from PIL import Image, ImageDraw

    pairs = tuned.pairs[:shown]
    side = ENLARGED * pairs[0].picture.shape[-1]
    gap, label = 6, 16
    ways = list(tuned.judged)
    width = 2 * side + sum(gap + 2 * side for _ in ways)
    page = Image.new("RGB", (width, label + len(pairs) * (side + label)), (255, 255, 255))
    pen = ImageDraw.Draw(page)
    for column, name in enumerate(["references", *ways]):
        pen.text((column * (2 * side + gap) + 2, 2), name, fill=(0, 0, 0))
    for row, pair in enumerate(pairs):
        top = label + row * (side + label)
        pen.text((2, top + side + 1), pair.prompt, fill=(90, 90, 90))
        columns = [list(pair.references)] + [list(tuned.judged[name].pictures[row]) for name in ways]
        for column, images in enumerate(columns):
            for place, image in enumerate(images):
                page.paste(_enlarged(image, side), (column * (2 * side + gap) + place * side, top))
    return page


def _enlarged(image: torch.Tensor, side: int) -> Any:
    from PIL import Image

    pixels = image.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def draw_losses(losses: Sequence[float], file: Path) -> None:
    """Training losses by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    steps, window = range(1, len(losses) + 1), max(1, len(losses) // 20)
    axes.plot(steps, losses, color="tab:blue", alpha=0.2, linewidth=0.8)
    axes.plot(steps, smoothed(list(losses), window), color="tab:blue", label=f"mean of {window} steps")
    axes.set(xlabel="step", title="loss in training")
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=100)


def _mean(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean and standard error."""
    if not values:
        return None
    return with_error(list(values)) if len(values) > 1 else (values[0], 0.0)


def _share(found: tuple[float, float] | None) -> str:
    return "-" if found is None else f"{found[0]:.1%} ± {WIDE * found[1]:.1%}"


def _number(found: tuple[float, float] | None) -> str:
    return "-" if found is None else f"{found[0]:.3f} ± {WIDE * found[1]:.3f}"
