"""A lane: one method through all cases of a comparison, and the numbers that it leaves."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field

import torch

from attn_plugins.handle import PatchHandle
from attn_plugins.measures import Measures
from attn_plugins.pipelines.comparing.asked import Asked
from attn_plugins.pipelines.comparing.clocks import Sites, Timing, spread, step_seconds
from attn_plugins.pipelines.comparing.likeness import Tally
from attn_plugins.pipelines.comparing.runs import Run
from attn_plugins.report import analyse
from attn_plugins.schedule import Schedule


@dataclass
class Lane:
    """What a method left so far. `runs` keep their clocks alone; `frames` the pictures of the first cases.

    `clock`: (attention, step) in seconds.
    """

    asked: Asked
    tally: Tally
    runs: list[Run] = field(default_factory=list)
    frames: list[torch.Tensor | None] = field(default_factory=list)
    name: str = ""
    summary: str = ""
    density: float | None = None
    schedules: list[Schedule] = field(default_factory=list)
    sites: Sites | None = None
    measures: Measures | None = None
    clock: tuple[float, float] = (0.0, 1.0)
    dense_clock: tuple[float, float] = (0.0, 1.0)

    def note(self, handle: PatchHandle) -> None:
        """What the patch is, at the sizes that it has just run at."""
        self.name, self.summary = self.asked.name(handle), summary(handle)
        self.density = density(handle)
        self.sites = Sites.of(handle)
        self.schedules = [patched.state.schedule for patched in handle.patches]

    def keep(self, run: Run, pictures: bool) -> None:
        """The clocks of a run, and its pictures if they are to be kept."""
        self.frames.append(run.frames if pictures else None)
        self.runs.append(dataclasses.replace(run, latents=[], frames=None))

    def sparse_steps(self, steps: int) -> range:
        """From the first to the last step in which some patch runs sparse."""
        ranges = [found for one in self.schedules if (found := one.sparse_steps(steps))]
        return range(min(one.start for one in ranges), max(one.stop for one in ranges)) if ranges else range(0)

    def timing(self, steps: range) -> Timing:
        """Medians over `steps` of all runs."""
        seconds, job = step_seconds(self.runs, steps), statistics.median(run.job for run in self.runs)
        return Timing(statistics.median(seconds), job, *self.clock, spread(seconds))


def summary(handle: PatchHandle) -> str:
    """The patch's own summary, and what of the run stayed dense although it was asked for."""
    reasons = sorted({reason for patched in handle.patches for reason in patched.state.warned})
    return "\n".join([handle.summary(), *(f"  stayed dense: {reason}" for reason in reasons)])


def density(handle: PatchHandle) -> float | None:
    """The mean over the patched models of what they compute of dense attention; None where it cannot be told."""
    saved = [row.saved for row in analyse(handle)]
    return None if any(value is None for value in saved) else 1 - statistics.mean(value or 0.0 for value in saved)
