"""What continue-pretraining of mixtures found: a table per domain, a JSON file, a picture of losses and routing."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_plugins.pipelines.tuning.tuned import smoothed, with_interval
from attn_plugins.training.routers import RouterRow
from attn_plugins.training.tasks import shown

SEED, DENSE, DENSE_LONG = "seed", "dense, as many steps", "dense, as many tokens in all"
MIXTURES: dict[str, dict[str, Any]] = {
    "btx": {"method": "btx", "attention": "mean"},
    "bam_shared_kv": {"method": "bam", "attention": "shared_kv"},
    "bam_expert_kv": {"method": "bam", "attention": "all_params"},
}


@dataclass(frozen=True)
class TunedBam:
    """held_out: by model, by domain, the loss of each of the same items. losses: of every training step, by run.
    routers: by mixture, by domain, what its routers did on the held-out items. sizes: parameters, by model.
    """

    model: str
    tasks: dict[str, str]
    unit: str
    settings: dict[str, Any]
    branch: dict[str, Any]
    processes: int
    sizes: dict[str, int]
    held_out: dict[str, dict[str, list[float]]]
    losses: dict[str, list[float]]
    routers: dict[str, dict[str, list[RouterRow]]]
    environment: dict[str, str]

    def shown(self, loss: float) -> float:
        return shown(self.unit, loss)

    def told(self, losses: list[float]) -> str:
        """Their mean as people read it."""
        return f"{self.shown(statistics.mean(losses)):{'.2f' if self.unit == 'perplexity' else '.3f'}}"

    def difference(self, name: str, other: str) -> tuple[float, float]:
        """Mean loss over the domains of one less that of another, item by item, and half of its 95 % interval."""
        pairs = (zip(self.held_out[name][d], self.held_out[other][d], strict=True) for d in self.tasks)
        gaps = [statistics.mean(a - b for a, b in item) for item in zip(*pairs, strict=True)]
        return with_interval(gaps)

    def table(self) -> str:
        """Markdown."""
        head = " | ".join(self.tasks)
        lines = [f"| {self.unit} | parameters | {head} | mean loss less the dense one's, as many steps |"]
        lines.append("|---" * (3 + len(self.tasks)) + "|")
        for name, domains in self.held_out.items():
            cells = " | ".join(self.told(domains[domain]) for domain in self.tasks)
            gap, error = self.difference(name, DENSE)
            beside = "-" if name == DENSE else f"{gap:+.4f} ± {error:.4f}"
            lines.append(f"| {name} | {self.sizes[name]:,} | {cells} | {beside} |")
        return "\n".join(lines)

    def sentences(self) -> list[str]:
        count = len(next(iter(self.held_out[SEED].values())))
        items = "rows" if self.unit == "perplexity" else "pictures"
        names = ("devices", "torch threads", "torch", "transformers")
        return [
            f"{self.model}; " + "; ".join(f"{domain}: {task}" for domain, task in self.tasks.items()),
            f"specialists {self.branch['steps']} steps, mixtures and dense {self.settings['steps']} steps of "
            f"{self.settings['batch'] * self.processes} {items}; {count} held-out {items} of each domain, ± half of a "
            "95 % interval over them",
            "; ".join(f"{name} {self.environment[name]}" for name in names),
        ]

    def save(self, folder: Path, name: str = "pretrained") -> list[Path]:
        """Write `<name>.json` and `<name>.png`; returns their paths."""
        files = [folder / f"{name}.json", folder / f"{name}.png"]
        told = dataclasses.asdict(self)
        told["routers"] = {
            mixture: {domain: [row._asdict() for row in rows] for domain, rows in domains.items()}
            for mixture, domains in self.routers.items()
        }
        files[0].write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        draw(self, files[1])
        return files


def draw(tuned: TunedBam, file: Path) -> None:
    """Losses in training; held-out results by domain; where the routers of each trained mixture send each domain."""
    from matplotlib.figure import Figure

    trained = [name for name in tuned.routers if not name.endswith("untrained")]
    figure = Figure(figsize=(7 + 4.2 * len(trained), 7.5), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    left, right = halves[0].subplots(1, 2)
    for name, losses in tuned.losses.items():
        if not name.startswith("expert"):
            left.plot(range(1, len(losses) + 1), smoothed(losses, max(1, len(losses) // 15)), label=name)
    left.set(xlabel="step", title="loss in training on all domains (smoothed)")
    left.legend(fontsize=8)

    names, width = list(tuned.held_out), 0.8 / len(tuned.tasks)
    for number, domain in enumerate(tuned.tasks):
        values = [tuned.shown(statistics.mean(tuned.held_out[name][domain])) for name in names]
        places = [place + number * width for place in range(len(names))]
        labels = [tuned.told(tuned.held_out[name][domain]) for name in names]
        bars = right.barh(places, values, width, label=domain)
        right.bar_label(bars, labels=labels, padding=2, fontsize=7)
    right.set(yticks=[place + 0.4 - width / 2 for place in range(len(names))], title=f"{tuned.unit}, held out")
    right.set_yticklabels(names, fontsize=8)
    right.margins(x=0.12)
    right.invert_yaxis()
    right.legend(fontsize=8)

    axes = halves[1].subplots(1, max(1, len(trained)), squeeze=False)[0]
    for name, panel in zip(trained, axes, strict=False):
        _shares(panel, name, tuned.routers[name], [SEED, *tuned.tasks])
    figure.savefig(file, dpi=110)


def _shares(panel: Any, name: str, domains: dict[str, list[RouterRow]], experts: list[str]) -> None:
    """Stacked shares of the experts, a bar for each layer's router and domain."""
    labels, stacks = [], []
    for rows in zip(*domains.values(), strict=True):
        for domain, row in zip(domains, rows, strict=True):
            total = sum(row.load) or 1.0
            stacks.append([share / total for share in row.load])
            labels.append(f"{_short(row.name)}: {domain}")
    starts = [0.0] * len(stacks)
    for expert, of in enumerate(experts):
        widths = [stack[expert] for stack in stacks]
        panel.barh(range(len(stacks)), widths, left=starts, label=of)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    panel.set(yticks=range(len(stacks)), xlim=(0, 1), title=f"{name}: shares of the experts")
    panel.set_yticklabels(labels, fontsize=6)
    panel.invert_yaxis()
    panel.legend(fontsize=7, loc="upper right")


def _short(name: str) -> str:
    """model.layers.3.mlp as 3.mlp."""
    return name.split("layers.")[-1]
