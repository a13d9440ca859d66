"""A profile: what each head of a model attends to, and what it is worth."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attn_plugins.pipelines.profiling.clusters import Cluster
from attn_plugins.pipelines.profiling.sums import LayerSums
from attn_plugins.report import table


@dataclass
class Profile:
    """Of one model.

    layers: sums by module name, in order; only such as ran. change, loss: importance of each head (see
    `profiling.importance`), empty or None where it was not measured. steps: steps (or forwards) that were seen.
    rows: query rows that were sampled of a head and call; inputs: what was run, in words.
    """

    model: str
    family: str
    layers: dict[str, LayerSums]
    change: dict[str, torch.Tensor]
    loss: dict[str, torch.Tensor] | None
    clusters: list[Cluster]
    steps: int
    rows: int
    sinks: int
    inputs: str = ""
    notes: list[str] = field(default_factory=list)

    def entropy(self, name: str) -> torch.Tensor:
        """(heads,) nats, the mean over rows."""
        return _mean(self.layers[name], "entropy")

    def distance(self, name: str) -> torch.Tensor:
        """(heads,) hops on a grid, or tokens back in a text: the mean over rows, text aside."""
        return _mean(self.layers[name], "distance")

    def share(self, name: str, what: str) -> torch.Tensor:
        """(heads,) of the mass: on the query's "own" token, on "text", on the "first" (of a text, or before a grid)."""
        sums = self.layers[name]
        return getattr(sums, what) / (sums.hops.sum(1) + sums.text).clamp(min=1e-30)

    def importance(self, name: str) -> torch.Tensor | None:
        """(heads,): of the loss where there is one, else of the output; None where it was not measured."""
        return (self.loss if self.loss is not None else self.change).get(name)

    @property
    def importance_of(self) -> str:
        return "loss, nats a token" if self.loss is not None else "relative change of the output"

    def by_step(self, name: str, what: str) -> dict[int, float]:
        """The mean over heads of "entropy" or "distance", by step."""
        steps = sorted(self.layers[name].steps.items())
        return {step: float((getattr(means, what) / max(means.rows, 1)).mean()) for step, means in steps}

    def table(self) -> list[str]:
        """A line for each layer, means over its heads; importance from its least to its most important head."""
        far = "tokens back" if all(sums.kind == "causal" for sums in self.layers.values()) else "hops"
        head = ("layer", "kind", "heads", "grid", "entropy", f"distance, {far}", "own", "first", "text", "importance")
        lines = []
        for name, sums in self.layers.items():
            worth = self.importance(name)
            told = "-" if worth is None else f"{float(worth.min()):.2g} to {float(worth.max()):.2g}"
            shares = [f"{float(self.share(name, what).mean()):.1%}" for what in ("own", "first", "text")]
            means = [f"{float(read(name).mean()):.2f}" for read in (self.entropy, self.distance)]
            lines.append((name, sums.kind, str(sums.heads), "x".join(map(str, sums.grid)), *means, *shares, told))
        return table([head, *lines])

    def summary(self) -> list[str]:
        """The table, the groups of heads, the trend over steps."""
        inputs = f"{self.inputs}; " if self.inputs else ""
        lines = [f"{self.model} ({self.family}): {inputs}{self.rows} rows a head and call, {self.steps} steps"]
        lines += [f"  {line}" for line in self.table()]
        if self.change:
            lines.append(f"  importance: {self.importance_of}, without the head")
        for cluster in self.clusters:
            some = ", ".join(f"{name}/{head}" for name, head in cluster.heads[:4])
            more = f" and {len(cluster.heads) - 4} more" if len(cluster.heads) > 4 else ""
            lines.append(f"  {len(cluster.heads)} heads attend to {cluster.title}: {some}{more}")
        diffusion = self.steps > 1 and any(sums.kind != "causal" for sums in self.layers.values())
        if diffusion:
            first, last = (self._all_layers(step) for step in (0, self.steps - 1))
            if first and last:
                lines.append(
                    f"  from the first step to the last, entropy goes from {first[0]:.2f} to {last[0]:.2f} nats, "
                    f"distance from {first[1]:.2f} to {last[1]:.2f} hops"
                )
        return [*lines, *(f"  note: {note}" for note in self.notes)]

    def _all_layers(self, step: int) -> tuple[float, float] | None:
        found = [[self.by_step(name, what).get(step) for name in self.layers] for what in ("entropy", "distance")]
        means = [[value for value in row if value is not None] for row in found]
        return None if not all(means) else (sum(means[0]) / len(means[0]), sum(means[1]) / len(means[1]))

    def save(self, folder: Path) -> list[Path]:
        """Write heads.csv, hops.csv, steps.csv and profile.json into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        files = {"heads": self._head_rows(), "hops": self._hop_rows(), "steps": self._step_rows()}
        written = []
        for name, rows in files.items():
            written.append(folder / f"{name}.csv")
            with written[-1].open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerows([[f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows])
        written.append(folder / "profile.json")
        written[-1].write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return written

    def to_dict(self) -> dict[str, Any]:
        head, *rows = self._head_rows()
        return {
            "model": self.model, "family": self.family, "inputs": self.inputs, "steps": self.steps, "rows": self.rows,
            "sinks": self.sinks, "importance_of": self.importance_of if self.change else None,
            "heads": [dict(zip(head, row, strict=True)) for row in rows],
            "clusters": [{"title": one.title, "centre": one.centre, "heads": one.heads} for one in self.clusters],
        }  # fmt: skip

    def _head_rows(self) -> list[list[Any]]:
        names = ("layer", "head", "kind", "entropy", "distance", "own", "first", "text", "change", "loss", "cluster")
        groups = {head: one.title for one in self.clusters for head in one.heads}
        rows: list[list[Any]] = [list(names)]
        for name, sums in self.layers.items():
            columns = [
                self.entropy(name),
                self.distance(name),
                *(self.share(name, w) for w in ("own", "first", "text")),
            ]
            worth = [self.change.get(name), (self.loss or {}).get(name)]
            for head in range(sums.heads):
                values: list[Any] = [float(column[head]) for column in columns]
                values += ["" if column is None else float(column[head]) for column in worth]
                rows.append([name, head, sums.kind, *values, groups.get((name, head), "")])
        return rows

    def _hop_rows(self) -> list[list[Any]]:
        """Mass by distance, of every head; axis "all": Chebyshev distance, or tokens back."""
        rows: list[list[Any]] = [["layer", "head", "axis", "distance", "share"]]
        for name, sums in self.layers.items():
            curves = [("all", sums.hops), *((str(axis), mass) for axis, mass in enumerate(sums.axes))]
            for axis, mass in curves if len(sums.axes) > 1 else curves[:1]:
                shares = (mass / mass.sum(1, keepdim=True).clamp(min=1e-30)).tolist()
                for head, curve in enumerate(shares):
                    rows += [[name, head, axis, distance, share] for distance, share in enumerate(curve) if share]
        return rows

    def _step_rows(self) -> list[list[Any]]:
        rows: list[list[Any]] = [["layer", "step", "entropy", "distance"]]
        for name in self.layers:
            entropy, distance = (self.by_step(name, what) for what in ("entropy", "distance"))
            rows += [[name, step, entropy[step], distance[step]] for step in entropy]
        return rows


def _mean(sums: LayerSums, what: str) -> torch.Tensor:
    rows = max(sum(means.rows for means in sums.steps.values()), 1)
    return torch.stack([getattr(means, what) for means in sums.steps.values()]).sum(0) / rows
