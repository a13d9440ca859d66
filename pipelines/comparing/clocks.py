"""Clocks: seconds of a step and of the job, and of attention within a step, in runs of its own."""

from __future__ import annotations

import contextlib
import math
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from attn_plugins.handle import PatchHandle
from attn_plugins.metrics import quantile
from attn_plugins.pipelines.comparing.asked import Asked
from attn_plugins.pipelines.comparing.overview import milliseconds
from attn_plugins.pipelines.comparing.runs import Run
from attn_plugins.pipelines.stopwatch import Dense, Stopwatch, attach
from attn_plugins.plan.simulator import end_to_end


@dataclass(frozen=True)
class Timing:
    """Medians in seconds. `step`: a denoising step; of the patched run, a sparse one. `job`: the whole call.

    `attention`: attention at the patched sites within a step, measured in runs of its own, because a clock around each
    layer costs time; `timed_step` is the step in those runs. `spread`: the step's 20 % and 80 % quantiles, nan where
    they are not known.
    """

    step: float
    job: float
    attention: float
    timed_step: float
    spread: tuple[float, float] = (math.nan, math.nan)

    @property
    def share(self) -> float:
        """Attention's share of a step."""
        return min(self.attention / self.timed_step, 1.0) if self.timed_step else math.nan


def bound(share: float) -> float:
    """What a part that is `share` of the time would give if it cost nothing (Amdahl)."""
    return end_to_end(math.inf, share)


@dataclass(frozen=True)
class Sites:
    """The layers and sizes of a patch: methods that share them share one clock of dense attention."""

    names: frozenset[str]
    min_tokens: tuple[int, int]

    @classmethod
    def of(cls, handle: PatchHandle) -> Sites:
        names = frozenset(layer.name for patched in handle.patches for layer in patched.layers)
        least = [patched.state.min_tokens for patched in handle.patches]
        pairs = [one if isinstance(one, tuple) else (one, one) for one in least]
        return cls(names, (min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)))

    @contextlib.contextmanager
    def dense(self, obj: object) -> Iterator[PatchHandle]:
        """Dense attention by PyTorch where the patch would be, without dense steps: for a clock around it."""
        asked = Asked(method=Dense(), settings={"dense_steps": 0, "min_tokens": self.min_tokens})
        with asked.patched(obj, layers=lambda site: site.name in self.names) as handle:
            yield handle


def clocked(call: Callable[[Callable[[], None]], Run], handle: PatchHandle) -> tuple[float, float]:
    """(attention per step, step), medians in seconds, over the steps after the first.

    call: runs the pipeline, and the function that it gets after each step.
    """
    watch, laps = Stopwatch(), []
    attach(watch, handle)
    run = call(lambda: laps.append(watch.lap()))
    return statistics.median(laps[1:] or laps), statistics.median(run.seconds)


def step_seconds(runs: list[Run], steps: range) -> list[float]:
    """Of some steps of all runs; the seconds of the very first step are not known (the prompt is in them)."""
    known = slice(max(steps.start - 1, 0), max(steps.stop - 1, 0))
    return [second for run in runs for second in (run.seconds[known] or run.seconds[-1:])]


def spread(seconds: list[float]) -> tuple[float, float]:
    """The 20 % and 80 % quantiles."""
    values = torch.tensor(seconds, dtype=torch.float64)
    return quantile(values, 0.2), quantile(values, 0.8)


NOTHING = (
    "No call of this run was patched: all stayed dense, for their size (min_tokens) or for what the method cannot "
    "honour, so there is nothing to gain or to lose here."
)


def scatter(ends: tuple[float, float]) -> str:
    """How far dense attention's own clock scatters, as a part of a sentence."""
    return f"dense itself takes {milliseconds(ends[0])} to {milliseconds(ends[1])} (20 % to 80 %)"


def machine(device: torch.device) -> str:
    """The device, the threads and PyTorch's version, for a table's head."""
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"
