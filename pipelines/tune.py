"""Tune a model that is at hand: choose, for each layer, group of heads and range of steps, among all methods.

    result = tune(DiffusionSubject(pipe), calibration=[...], validation=[...], test=[...], budget=Budget(faster=1.5))
    result.save(Path("tuned"))                            # recipe, tables, plot
    attn_plugins.patch(pipe, "tuned/recipe.yaml")

A dense run gives forwards; each candidate's error and time at each place are measured in them (tuner/profile.py), what
an error at some step does to the end in a few runs more (tuner/steps.py); an integer program chooses for every budget
of time (tuner/plans.py); its plans and every preset of a single method are then run on cases that nothing was fitted to
(tuner/outcomes.py), and the best of them all is taken. What is reported is measured on a third set of cases.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_plugins.pipelines.tuner import outcomes, plans, profile, steps
from attn_plugins.pipelines.tuner.candidates import candidates, methods_for, on_head_groups, singles
from attn_plugins.pipelines.tuner.outcomes import Budget, Outcome
from attn_plugins.pipelines.tuner.subject import Subject, Tick


@dataclass(frozen=True)
class TuneSettings:
    """How much is tried.

    Args:
        methods: names; None: all that take such layers and need no weights.
        probes: forwards of the dense run in which candidates are measured.
        groups: runs of neighbouring layers that share a choice; None: each layer has its own.
        head_groups: runs of heads that may differ within a layer, for methods that can (gna).
        parts: of the schedule, whose weight is measured by a run each.
        plans: how many of the front's plans are run.
    """

    methods: tuple[str, ...] | None = None
    probes: int = 3
    groups: int | None = None
    head_groups: int = 1
    parts: int = 3
    plans: int = 6

    def __post_init__(self) -> None:
        for name in ("probes", "head_groups", "parts", "plans"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")


@dataclass(frozen=True)
class TuneResult:
    """`validation`: all that ran, `tested`: those worth it on the last cases. `chosen` is of `tested`."""

    subject: Subject
    budget: Budget
    chosen: Outcome
    met: bool
    tested: tuple[Outcome, ...]
    validation: tuple[Outcome, ...]
    failed: tuple[str, ...]

    def save(self, folder: Path) -> list[Path]:
        """Write recipe.yaml, front.csv and, with matplotlib, front.png."""
        from attn_plugins.pipelines.tuner.files import save

        return save(self, folder)


def tune(
    subject: Subject,
    *,
    calibration: Any,
    validation: Sequence[Any],
    test: Sequence[Any] = (),
    budget: Budget | None = None,
    settings: TuneSettings | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> TuneResult:
    """Find the best setting under a budget. The model is left as it was.

    Args:
        calibration: one case of the subject: what the profile is made of.
        validation: cases that choose among plans and presets.
        test: cases that are reported; () reports the validation, which is then a little too good.
        folder: where the profile is kept as it grows; a run that is started again there goes on.
        progress: show a bar.

    Raises:
        ValueError: no cases to choose by, a model that is patched, or no method that takes its layers.
    """
    settings, budget = settings or TuneSettings(), budget or Budget()
    if not validation:
        raise ValueError("validation is empty: give at least one case to choose by")
    _check_plain(subject)
    methods = methods_for(subject, settings.methods)
    if not methods:
        raise ValueError("no registered method takes the layers of this model without training")
    with _ticker(progress) as stage:
        tick = stage("dense run", None)
        dense, probes = subject.record(calibration, settings.probes)
        tick("dense")
        tried = candidates(subject, methods)
        tried += on_head_groups(subject, tried, settings.head_groups)
        total = profile.forwards(subject.places, len(tried), len(probes), settings.groups)
        path = None if folder is None else _made(folder) / "profile.json"
        found = profile.measure(subject, tried, probes, groups=settings.groups, path=path, tick=stage("profile", total))
        weights = steps.weights(
            subject, found, calibration, dense, parts=settings.parts,
            tick=stage("steps", settings.parts if subject.has_steps else None),
        )  # fmt: skip
        front = _thinned(plans.front(subject, found, weights, dense.seconds, dense.forwards), settings.plans)
        whats = [*front, *singles(subject, methods)]
        tick = stage("validation", outcomes.runs(len(whats), len(validation)))
        seen, failed = outcomes.measure(subject, whats, validation, tick)
        if not seen:
            raise ValueError(f"no setting could run: {'; '.join(failed)}")
        chosen, met = budget.best(seen)
        tested = seen
        if test:
            presets = [one for one in seen if not one.tuned]
            worth = [*outcomes.best_of(seen), *outcomes.best_of(presets), chosen]
            worth += [budget.best(presets)[0]] if presets else []
            again = list({one.label: one.what for one in worth}.values())
            tick = stage("test", outcomes.runs(len(again), len(test)))
            tested, _ = outcomes.measure(subject, again, test, tick)
            chosen = next(one for one in tested if one.what is chosen.what)
    return TuneResult(subject, budget, chosen, met, tuple(tested), tuple(seen), tuple(failed))


def _thinned(front: list[Any], count: int) -> list[Any]:
    """`count` of a front, both ends among them."""
    if len(front) <= count:
        return front
    return [front[round(place * (len(front) - 1) / max(count - 1, 1))] for place in range(count)]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_plain(subject: Subject) -> None:
    from attn_plugins import record
    from attn_plugins.targets import find

    if any(record.patches_of(target.root) for target in find(subject.obj)):
        raise ValueError("this model is patched already: attn_plugins.unpatch it first")


@contextlib.contextmanager
def _ticker(progress: bool) -> Iterator[Any]:
    """`stage(name, total)` begins a bar and gives what moves it."""
    if not progress:
        yield lambda name, total: lambda label: None
        return
    from rich.progress import Progress

    with Progress() as bar:

        def stage(name: str, total: int | None) -> Tick:
            task = bar.add_task(name, total=total)
            return lambda label: bar.update(task, advance=1, description=f"{name}: {label}")

        yield stage
