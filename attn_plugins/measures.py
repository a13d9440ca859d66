"""What was measured of a run, per layer and step: how much of dense attention was kept, and what became of outputs."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from attn_plugins.report import table

NAMES = ("recall", "oracle", "density", "relative_l1")
TITLES = ("recall", "oracle", "density", "rel. L1")
UNKNOWN = "-"
NOTHING = "nothing measured: no layer ran sparse (only dense steps, or calls that stayed dense)"


@dataclass(frozen=True)
class Shares:
    """Means over sampled rows of all heads and batch items, padding left out.

    `recall`: the share of dense attention's weights on the keys that were kept. `oracle`: what the best choice of as
    many blocks (or keys, where single keys are chosen) would have had, row by row. `density`: the share of the dense
    pairs that were kept. All None for methods that are no choice of pairs. `relative_l1`: |sparse - dense| / |dense| of
    the attention's output, summed over the rows.
    """

    recall: float | None
    oracle: float | None
    density: float | None
    relative_l1: float


@dataclass(frozen=True)
class LayerStep(Shares):
    """The shares of one layer in one step, the mean over its `calls`.

    `model`: which of the handle's models, from 0. `layer`: the module's name. `step` counts from 0; where a model has
    no steps, it counts forwards.
    """

    model: int
    layer: str
    step: int
    calls: int


class Measures:
    """Fills while the pipeline runs; see `PatchHandle.measure`.

    Args:
        layers: (model, module name) of the patched layers, in order.
        rows: how many query rows of a head are sampled.

    Attributes:
        steps: how many steps have been seen, dense ones included.
    """

    def __init__(self, layers: list[tuple[int, str]], rows: int) -> None:
        self.layers = layers
        self.rows = rows
        self.steps = 0
        self._found: dict[tuple[int, str, int], list[Shares]] = {}

    def add(self, model: int, layer: str, step: int, shares: Shares) -> None:
        """One call more."""
        self.steps = max(self.steps, step + 1)
        self._found.setdefault((model, layer, step), []).append(shares)

    @property
    def layer_steps(self) -> list[LayerStep]:
        """A row for each layer and step that ran sparse, layer after layer: `pandas.DataFrame` takes the list."""
        place = {layer: number for number, layer in enumerate(self.layers)}
        rows = []
        for model, layer, step in sorted(self._found, key=lambda key: (place[key[:2]], key[2])):
            calls = self._found[model, layer, step]
            recall, oracle, density, drift = (mean(getattr(one, name) for one in calls) for name in NAMES)
            assert drift is not None  # every call has one
            rows.append(LayerStep(recall, oracle, density, drift, model, layer, step, len(calls)))
        return rows

    def grid(self, name: str) -> torch.Tensor:
        """(layers, steps) float64 of one measure, nan where nothing ran sparse.

        Raises:
            ValueError: an unknown name.
        """
        if name not in NAMES:
            raise ValueError(f"{name!r} is no measure: there are {', '.join(NAMES)}")
        found = torch.full((len(self.layers), self.steps), math.nan, dtype=torch.float64)
        place = {layer: number for number, layer in enumerate(self.layers)}
        for row in self.layer_steps:
            value = getattr(row, name)
            found[place[row.model, row.layer], row.step] = math.nan if value is None else value
        return found

    def per_layer(self) -> list[tuple[str, ...]]:
        """Cells of a table: a header, a line for each layer (the means over its steps), and one for all."""
        rows = self.layer_steps
        lines = []
        for model, layer in self.layers:
            mine = [row for row in rows if (row.model, row.layer) == (model, layer)]
            if mine:
                lines.append((self.label(model, layer), _steps(mine), *cells(mine)))
        return [("layer", "steps", *TITLES), *lines, ("all", _steps(rows), *cells(rows))]

    def table(self) -> str:
        """`per_layer` as text, or why there is nothing to show."""
        return "\n".join(table(self.per_layer())) if self._found else NOTHING

    def summary(self) -> str:
        """The means in one line, and the layer and step that kept least."""
        rows = self.layer_steps
        if not rows:
            return NOTHING
        means = ", ".join(f"{title} {cell}" for title, cell in zip(TITLES, cells(rows), strict=True) if cell != UNKNOWN)
        text = f"measured in steps {_steps(rows)} of {self.steps}, {self.rows} rows a head: {means}"
        known = [row for row in rows if row.recall is not None]
        if known:
            least = min(known, key=lambda row: row.recall or 0.0)
            text += f"; least recall {least.recall:.1%} in {self.label(least.model, least.layer)}, step {least.step}"
        return text

    def label(self, model: int, layer: str) -> str:
        """A layer's name, with its model's number where there are several."""
        return f"{model}: {layer}" if any(other for other, _ in self.layers) else layer

    def save(self, path: str | Path) -> Path:
        """Write every row as CSV; what is not known stays empty."""
        path = Path(path)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            names = ("model", "layer", "step", "calls", *NAMES)
            writer.writerow(names)
            for row in self.layer_steps:
                values = [getattr(row, name) for name in names]
                writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])
        return path

    def __repr__(self) -> str:
        return f"<Measures: {self.summary()}>"


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def cells(rows: Iterable[Shares]) -> tuple[str, str, str, str]:
    """The means of some rows as text: recall, oracle, density, relative L1."""
    rows = list(rows)
    recall, oracle, density, drift = (mean(getattr(row, name) for row in rows) for name in NAMES)
    shares = tuple(UNKNOWN if value is None else f"{value:.1%}" for value in (recall, oracle, density))
    return (*shares, UNKNOWN if drift is None else f"{drift:.1e}")  # type: ignore[return-value]


def _steps(rows: list[LayerStep]) -> str:
    if not rows:
        return UNKNOWN
    first, last = (choose(row.step for row in rows) for choose in (min, max))
    return f"{first}-{last}" if last > first else str(first)
