"""What became of plans and presets in real runs, dense runs between them, and which of them meets a budget."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from attn_plugins.patching import patch
from attn_plugins.pipelines.tuner import rows
from attn_plugins.pipelines.tuner.candidates import Single
from attn_plugins.pipelines.tuner.memory import Memory, mark
from attn_plugins.pipelines.tuner.plans import Plan
from attn_plugins.pipelines.tuner.subject import Ran, Subject, Tick, sentence

DEFAULT_FASTER = 1.2
BETWEEN = 6  # runs of settings from one dense run to the next


@dataclass(frozen=True, eq=False)
class Outcome:
    """A setting over some cases. `losses`, `seconds`: of each; `dense`: seconds of the dense run before it.

    `foreseen`: (speedup, loss) of a plan, None of a preset. `density`: of all places, those without
    a patch and dense steps counted as 1.
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
        """Of whole runs: dense over patched, the median of the cases."""
        return statistics.median(dense / own for dense, own in zip(self.dense, self.seconds, strict=True))

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

    def meets(self, one: Outcome) -> bool:
        """Whether an outcome is within the budget; one that is dense throughout, or no faster, meets none."""
        if one.density == 1 or one.speedup <= 1:
            return False
        return one.loss <= self.lose if self.lose is not None else one.speedup >= self.wanted

    def best(self, outcomes: Sequence[Outcome]) -> tuple[Outcome, bool]:
        """(the one to take, whether it meets the budget)."""
        enough = [one for one in outcomes if self.meets(one)]
        if self.lose is not None:
            if enough:
                return max(enough, key=lambda one: one.speedup), True
            return min(outcomes, key=lambda one: one.loss), False
        if enough:
            return min(enough, key=lambda one: one.loss), True
        return max(outcomes, key=lambda one: one.speedup), False

    @property
    def wanted(self) -> float:
        """The speedup that is asked for; without one and without a loss the default."""
        return self.faster or DEFAULT_FASTER

    def nearest(self, plans: Sequence[Plan]) -> int:
        """The place in a front, quickest first, of the plan that should meet it best."""
        if self.lose is not None:
            within = [place for place, plan in enumerate(plans) if plan.loss <= self.lose]
            return within[0] if within else len(plans) - 1
        enough = [place for place, plan in enumerate(plans) if plan.speedup >= self.wanted]
        return enough[-1] if enough else 0


def measure(
    subject: Subject,
    whats: Sequence[Plan | Single],
    cases: Sequence[Any],
    tick: Tick = lambda name: None,
    memory: Memory | None = None,
) -> tuple[list[Outcome], list[str]]:
    """(outcomes, why some could not run): every setting on every case, a dense run before each few of them.

    memory: what it holds of the same settings and cases is not run again.
    """
    memory = memory or Memory()
    found: dict[str, list[list[float | None]]] = {}
    failed: dict[str, str] = {}
    for case in cases:
        dense, since = subject.run(case), 0
        tick("dense")
        at = mark(dense.result)
        for what in whats:
            key = f"{what.label}|{mark(what.told)}|{at}"
            if what.label not in failed:
                if key not in memory:
                    if since == BETWEEN:  # what a machine gives changes over minutes
                        dense, since = subject.run(case), 0
                    since += 1
                try:
                    row = memory.of(key, partial(_ran, subject, what, case, dense))
                except (ValueError, RuntimeError) as error:
                    failed[what.label] = f"{what.label}: {sentence(error)}"
                else:
                    if row[0] is None:
                        failed[what.label] = f"{what.label}: gave numbers that are not finite"
                    found.setdefault(what.label, []).append(row)
            tick(what.label)
    outcomes = []
    for what in whats:
        if what.label not in failed:
            losses, seconds, beside, densities = zip(*found[what.label], strict=True)
            outcomes.append(Outcome(what, losses, seconds, beside, densities[-1]))
    return outcomes, list(failed.values())


def _ran(subject: Subject, what: Plan | Single, case: Any, dense: Ran) -> list[float | None]:
    """(loss, seconds, the dense run's, density) of one case with a setting; no loss where it is not finite."""
    with applied(subject, what) as handle:
        ran = subject.run(case)
        loss = subject.loss(ran.result, dense.result)
        share = rows.density(handle, len(subject.places))
    return [loss if math.isfinite(loss) else None, ran.seconds, dense.seconds, share]


def runs(whats: int, cases: int) -> int:
    """How many ticks `measure` takes."""
    return cases * (whats + 1)


def timed_with(one: Outcome, other: Outcome) -> Outcome:
    """`one` with the times of both: its losses choose, and speed is the machine's, on any case."""
    if one is other:
        return one
    return dataclasses.replace(one, seconds=one.seconds + other.seconds, dense=one.dense + other.dense)


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = rows.patched(subject, what.told) if isinstance(what, Plan) else patch(subject.obj, **what.settings)
        try:
            yield handle
        finally:
            handle.remove()
