"""What became of plans and presets in real runs, dense runs between them, and which of them meets a budget."""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_plugins import recipe, report
from attn_plugins.patching import patch
from attn_plugins.pipelines.tuner.candidates import Single
from attn_plugins.pipelines.tuner.plans import Plan
from attn_plugins.pipelines.tuner.subject import Ran, Subject, Tick

DEFAULT_FASTER = 1.2


@dataclass(frozen=True, eq=False)
class Outcome:
    """A setting over some cases. `losses`, `seconds`: of each; `dense`: seconds of the dense runs beside them.

    `foreseen`: (speedup, loss) of a plan, None of a preset. `density`: of the patched sites, dense steps counted as 1.
    """

    what: Plan | Single
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    dense: tuple[float, ...]
    density: float | None = None

    @property
    def label(self) -> str:
        return self.what.label

    @property
    def tuned(self) -> bool:
        return isinstance(self.what, Plan)

    @property
    def foreseen(self) -> tuple[float, float] | None:
        return (self.what.speedup, self.what.loss) if isinstance(self.what, Plan) else None

    @property
    def speedup(self) -> float:
        """Of whole runs: dense over patched, medians over the cases."""
        return statistics.median(self.dense) / statistics.median(self.seconds)

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def half(self) -> float:
        """Half of the 95 % interval (Student's) of the loss, from its spread over the cases; infinite with one."""
        if len(self.losses) < 2:
            return math.inf
        from scipy.stats import t as student

        cases = len(self.losses)
        return float(student.ppf(0.975, cases - 1)) * statistics.stdev(self.losses) / math.sqrt(cases)


@dataclass(frozen=True)
class Budget:
    """`faster`: a speedup that is to be reached, at the least loss. `lose`: a loss that is not to be exceeded, as fast
    as can be. One of both; neither is `faster=1.2`.

    Raises:
        ValueError: both are given, a speedup of 1 or less, or a loss that is not positive.
    """

    faster: float | None = None
    lose: float | None = None

    def __post_init__(self) -> None:
        if self.faster is not None and self.lose is not None:
            raise ValueError("faster and lose are two budgets: give one; what the other then is stands in the report")
        if self.faster is not None and not self.faster > 1:
            raise ValueError(f"faster={self.faster}: a speedup above 1, such as 1.5")
        if self.lose is not None and not self.lose > 0:
            raise ValueError(f"lose={self.lose}: a loss above 0, in the units that the report names")

    def best(self, outcomes: Sequence[Outcome]) -> tuple[Outcome, bool]:
        """(the one to take, whether it meets the budget)."""
        if self.lose is not None:
            within = [one for one in outcomes if one.loss <= self.lose]
            if within:
                return max(within, key=lambda one: one.speedup), True
            return min(outcomes, key=lambda one: one.loss), False
        enough = [one for one in outcomes if one.speedup >= (self.faster or DEFAULT_FASTER)]
        if enough:
            return min(enough, key=lambda one: one.loss), True
        return max(outcomes, key=lambda one: one.speedup), False


def measure(
    subject: Subject, whats: Sequence[Plan | Single], cases: Sequence[Any], tick: Tick = lambda name: None
) -> tuple[list[Outcome], list[str]]:
    """(outcomes, why some could not run): every setting on every case, a dense run before and after them all."""
    losses: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    densities: dict[str, float | None] = {}
    dense: list[float] = []
    failed: dict[str, str] = {}
    for case in cases:
        before = subject.run(case)
        tick("dense")
        for what in whats:
            if what.label in failed:
                tick(what.label)
                continue
            try:
                with applied(subject, what) as handle:
                    ran: Ran = subject.run(case)
                    densities[what.label] = density(handle)
            except (ValueError, RuntimeError) as error:
                failed[what.label] = f"{what.label}: {str(error).splitlines()[0]}"
            else:
                losses.setdefault(what.label, []).append(subject.loss(ran.result, before.result))
                seconds.setdefault(what.label, []).append(ran.seconds)
            tick(what.label)
        dense += [before.seconds, subject.run(case).seconds]
        tick("dense")
    found = [
        Outcome(what, tuple(losses[what.label]), tuple(seconds[what.label]), tuple(dense), densities[what.label])
        for what in whats
        if what.label not in failed
    ]
    return found, list(failed.values())


def runs(whats: int, cases: int) -> int:
    """How many ticks `measure` takes."""
    return cases * (whats + 2)


def best_of(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Those that no other beats in both speed and loss, quickest first."""
    kept: list[Outcome] = []
    for one in sorted(outcomes, key=lambda one: (-one.speedup, one.loss)):
        if not kept or one.loss < kept[-1].loss:
            kept.append(one)
    return kept


@contextlib.contextmanager
def applied(subject: Subject, what: Plan | Single) -> Iterator[Any]:
    """Patched by a plan's recipe or by a preset; calls that stay dense say nothing."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        if isinstance(what, Plan):
            handle = patch(subject.obj, recipe.write_rows([dict(row) for row in what.rows], Path(folder) / "plan.yaml"))
        else:
            handle = patch(subject.obj, **what.settings)
        try:
            yield handle
        finally:
            handle.remove()


def density(handle: Any) -> float | None:
    """Mean over the patched sites, steps that stay dense counted as 1; None where it cannot be told."""
    shares = []
    for row in report.analyse(handle):
        for group in row.groups:
            if group.density is None or row.dense_share is None:
                return None
            shares += [row.dense_share + (1 - row.dense_share) * group.density] * len(group.names)
    return statistics.fmean(shares) if shares else None
