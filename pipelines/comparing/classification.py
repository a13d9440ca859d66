"""An image classifier, dense against patched: what it says of pictures, and how long a batch takes.

Each batch is run dense, by each method, and dense again, in turn; the second dense run is the noise floor.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attn_plugins import record
from attn_plugins.handle import PatchHandle
from attn_plugins.metrics import kl_divergence, mean_interval, top1_agreement
from attn_plugins.pipelines.comparing import progress as bars
from attn_plugins.pipelines.comparing.asked import Asked
from attn_plugins.pipelines.comparing.clocks import NOTHING, Sites, Timing, bound, machine, scatter, spread
from attn_plugins.pipelines.comparing.lanes import density, summary
from attn_plugins.pipelines.comparing.overview import (
    Figures,
    cell,
    columns_of,
    milliseconds,
    overview,
    quantiles_of_kl,
    with_ends,
)
from attn_plugins.pipelines.stopwatch import Stopwatch, attach, now
from attn_plugins.report import table
from attn_plugins.runtime import device_of
from attn_plugins.targets import find

TIMED = 3  # batches at most whose attention is timed


@dataclass(frozen=True)
class ClassifierComparison:
    """Dense against patched on the same pictures. `kl`, `agree`: (pictures,) of the method; `noise_*`: of dense again.

    Times are of a forward of `batch` pictures; a `Timing`'s step and job are both that.
    """

    model: str
    method: str
    summary: str
    density: float | None
    batch: int
    dense: Timing
    patched: Timing
    kl: torch.Tensor = field(repr=False)
    agree: torch.Tensor = field(repr=False)
    noise_kl: torch.Tensor = field(repr=False)
    noise_agree: torch.Tensor = field(repr=False)
    machine: str
    notes: tuple[str, ...] = ()

    @property
    def batch_bound(self) -> float:
        return bound(self.dense.share)

    def figures(self) -> Figures:
        """The patched model's numbers by name (overview.py)."""
        attention = self.patched.attention
        return {
            "density": self.density, "batch_seconds": self.patched.step,
            "batch_speedup": self.dense.step / self.patched.step, "batch_bound": self.batch_bound,
            "attention_seconds": attention,
            "attention_speedup": self.dense.attention / attention if attention else None,
            "attention_share": self.patched.share, **_quality(self.kl, self.agree),
        }  # fmt: skip

    def floor(self) -> Figures:
        """The same of dense: its times, and how far it is from itself, run again."""
        return {
            "density": 1.0, "batch_seconds": self.dense.step, "attention_seconds": self.dense.attention,
            "attention_share": self.dense.share, **_quality(self.noise_kl, self.noise_agree),
        }  # fmt: skip

    def sentences(self) -> tuple[str, str, str]:
        """Speed, cost and bound, one sentence each."""
        figures, floor = self.figures(), self.floor()
        own, dense = ({one.name: cell(one, row) for one in columns_of([row])} for row in (figures, floor))
        speed = (
            f"A batch of {self.batch} takes {milliseconds(self.patched.step)} where dense takes "
            f"{milliseconds(self.dense.step)}, {self.dense.step / self.patched.step:.2f}x; "
            f"{scatter(self.dense.spread)}."
        )
        cost = (
            f"KL(dense || patched) is {own['kl']} nats a picture, and {own['top1']} of the first choices are dense's "
            f"(dense against itself: {dense['kl']} nats, {dense['top1']})."
        )
        limit = (
            f"Attention at the patched sites is {self.dense.share:.1%} of a dense forward, so no method could be "
            f"faster than {self.batch_bound:.2f}x (Amdahl)."
        )
        return speed, cost, limit if self.dense.attention else NOTHING

    def render(self) -> str:
        """A table in plain text."""
        title = f"{self.method} on {self.model}: {len(self.kl)} pictures (95 % intervals); {self.machine}"
        both = overview({"dense": self.floor(), self.method: self.figures()})
        return "\n".join([title, "", self.summary, "", *table(both)])

    def __str__(self) -> str:
        return self.render()


def compare_classifier(
    model: Any, asked: Sequence[Asked], batches: Sequence[torch.Tensor], *, progress: bool = False
) -> list[ClassifierComparison]:
    """Several methods beside each other, all against the same dense model. The model is left as it was.

    Args:
        model: an image classifier of transformers that is not patched.
        asked: the methods with their settings.
        batches: pixels (B, 3, H, W) each, as the model takes them.
        progress: show a bar.

    Raises:
        ValueError: no pictures, no methods, a patched model.
    """
    if not asked or not len(batches):
        raise ValueError("nothing to compare: give one or more methods, and pictures")
    if any(record.patches_of(target.root) for target in find(model)):
        raise ValueError(f"this {type(model).__name__} is patched already: attn_plugins.unpatch(model) first")
    device, kind = device_of(model), next(model.parameters()).dtype
    inputs = [batch.to(device, kind) for batch in batches]
    lanes, dense, again = [_Lane(one) for one in asked], _Lane(Asked("dense")), _Lane(Asked("dense again"))
    timed = inputs[:TIMED]
    total = (len(inputs) + 1) * (len(lanes) + 1) + len(inputs) + 2 * len(lanes) * len(timed)
    with bars.bar(progress, total) as tick:
        for batch in [inputs[0], *inputs]:  # the first once more: it warms up
            logits = dense.run(model, batch)
            tick("dense")
            for lane in lanes:
                with lane.asked.patched(model) as handle:
                    lane.run(model, batch, logits)
                    lane.note(handle)
                tick(lane.name)
            if dense.warm:
                again.run(model, batch, logits)
                tick("dense again")
            for lane in (dense, *lanes, again):
                lane.warm = True
        found, clocks = [], {}
        for lane in lanes:
            assert lane.sites is not None  # every lane has run
            if lane.sites not in clocks:
                with lane.sites.dense(model) as handle:
                    clocks[lane.sites] = _clocked(model, timed, handle, lambda: tick("attention"))
            with lane.asked.patched(model) as handle:
                own = _clocked(model, timed, handle, lambda: tick("attention"))
            both = dense.seconds + again.seconds
            step, baseline = statistics.median(lane.seconds), statistics.median(both)
            found.append(
                ClassifierComparison(
                    type(model).__name__, lane.name, lane.summary, lane.density, len(inputs[0]),
                    Timing(baseline, baseline, *clocks[lane.sites], spread(both)), Timing(step, step, *own),
                    *lane.quality(), *again.quality(), machine(device),
                )
            )  # fmt: skip
    return found


class _Lane:
    """What one way to run the model gave, batch by batch; nothing is kept of the run that warms it up."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.name = self.summary = asked.label
        self.density: float | None = None
        self.sites: Sites | None = None
        self.warm = False
        self.seconds: list[float] = []
        self.kl: list[torch.Tensor] = []
        self.agree: list[torch.Tensor] = []

    def run(self, model: Any, batch: torch.Tensor, dense: torch.Tensor | None = None) -> torch.Tensor:
        seconds, logits = _forward(model, batch)
        if self.warm:
            self.seconds.append(seconds)
            if dense is not None:
                self.kl.append(kl_divergence(dense, logits))
                self.agree.append(top1_agreement(dense, logits))
        return logits

    def note(self, handle: PatchHandle) -> None:
        self.name, self.summary = self.asked.name(handle), summary(handle)
        self.density, self.sites = density(handle), Sites.of(handle)

    def quality(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat(self.kl), torch.cat(self.agree)


@torch.inference_mode()
def _forward(model: Any, batch: torch.Tensor) -> tuple[float, torch.Tensor]:
    start = now(batch.device)
    logits = model(batch).logits
    return now(batch.device) - start, logits


def _clocked(model: Any, batches: Sequence[torch.Tensor], handle: PatchHandle, tick: Any) -> tuple[float, float]:
    """(attention, forward), medians in seconds."""
    watch = Stopwatch()
    attach(watch, handle)
    rows = []
    for batch in batches:
        seconds, _ = _forward(model, batch)
        rows.append((watch.lap(), seconds))
        tick()
    attention, forward = (statistics.median(column) for column in zip(*rows, strict=True))
    return attention, forward


def _quality(kl: torch.Tensor, agree: torch.Tensor) -> Figures:
    found: Figures = {}
    for name, values, most in (("kl", kl, float("inf")), ("top1", agree, 1.0)):
        interval = mean_interval(values.double().tolist()).within(0.0, most)
        found |= {name: interval.mean, **with_ends(name, interval)}
    return found | quantiles_of_kl(kl)
