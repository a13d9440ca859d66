"""Tune a model that is at hand: choose, for each layer, group of heads and range of steps, among all methods.

    result = tune(DiffusionSubject(pipe), calibration=[...], validation=[...], test=[...], budget=Budget(faster=1.5))
    result.save(Path("tuned"))                            # recipe, tables, plot
    attn_plugins.patch(pipe, "tuned/recipe.yaml")

A dense run gives forwards; each candidate's error and time at each place are measured in them (tuner/profile.py), what
an error at some step does to the end in a few runs more (tuner/steps.py); an integer program chooses for every budget
of time (tuner/plans.py). Every preset of a single method runs on other cases (tuner/outcomes.py), and what they lose
there scales the profile's errors (tuner/corrections.py); the program's plans run beside them, and the best of them all
is taken. What is reported is measured on a third set of cases.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import attn_plugins
from attn_plugins.pipelines.benching.machine import commit
from attn_plugins.pipelines.tuner import corrections, outcomes, plans, profile, steps
from attn_plugins.pipelines.tuner.candidates import (
    Candidate,
    Single,
    candidates,
    methods_for,
    on_head_groups,
    singles,
)
from attn_plugins.pipelines.tuner.files import machine
from attn_plugins.pipelines.tuner.memory import Memory, mark
from attn_plugins.pipelines.tuner.outcomes import Budget, Outcome
from attn_plugins.pipelines.tuner.plans import Plan
from attn_plugins.pipelines.tuner.subject import Probe, Subject, Tick

SAME = 1e-3  # error of a forward that is run again: GPUs add in another order


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
        all_presets: report every preset, not those alone that no other beats.
    """

    methods: tuple[str, ...] | None = None
    probes: int = 3
    groups: int | None = None
    head_groups: int = 1
    parts: int = 3
    plans: int = 6
    all_presets: bool = False

    def __post_init__(self) -> None:
        for name in ("probes", "groups", "head_groups", "parts", "plans"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give 1 or more")


@dataclass(frozen=True)
class TuneResult:
    """`validation`: all that ran, `tested`: those worth it on the last cases, `chosen` among them. `about`: the
    machine, versions, commit and date of the measurements."""

    subject: Subject
    budget: Budget
    chosen: Outcome
    met: bool
    tested: tuple[Outcome, ...]
    validation: tuple[Outcome, ...]
    failed: tuple[str, ...]
    about: Mapping[str, Any]

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
        folder: where what was measured is kept (measured.jsonl); a run that is started again there goes on.
        progress: show a bar.

    Raises:
        ValueError: no cases to choose by, a model that is patched, or whose forwards give something else when they are
            run again, no method that takes its layers, a folder with numbers of another machine or version.
        ImportError: no SciPy.
    """
    settings, budget = settings or TuneSettings(), budget or Budget()
    if importlib.util.find_spec("scipy") is None:
        raise ImportError("the tuner chooses by SciPy's optimisers: pip install scipy")
    if not validation:
        raise ValueError("validation is empty: give at least one case to choose by")
    _check_plain(subject)
    methods = methods_for(subject, settings.methods)
    if not methods:
        raise ValueError("no registered method takes the layers of this model without training")
    memory = Memory(None if folder is None else _made(folder) / "measured.jsonl", about(subject))
    with _ticker(progress) as stage:
        tick = stage("dense run", None)
        dense, probes = subject.record(calibration, settings.probes)
        job = memory.of(f"job|{mark(dense.result)}", lambda: [dense.seconds])[0] or dense.seconds
        _check_again(subject, probes)
        tick("dense")
        tried = candidates(subject, methods)
        tried += on_head_groups(subject, tried, settings.head_groups)
        total = profile.forwards(subject.places, len(tried), len(probes), settings.groups)
        found = profile.measure(
            subject, tried, probes, groups=settings.groups, memory=memory, tick=stage("profile", total)
        )
        weights = steps.weights(
            subject, found, calibration, dense, parts=settings.parts, memory=memory,
            tick=stage("steps", settings.parts if subject.has_steps else None),
        )  # fmt: skip
        presets = singles(subject, methods)
        tick = stage("validation: presets", outcomes.runs(len(presets), len(validation)))
        seen, failed = outcomes.measure(subject, presets, validation, tick, memory)
        scaled = corrections.scaled(found, corrections.scales(subject, found, weights, seen))
        share = float(found.dense.sum()) * dense.forwards / job
        share *= corrections.savings(subject, found, seen, share)
        front = plans.front(subject, scaled, weights, share, budget.faster)
        front = _thinned(front, settings.plans, budget)
        tick = stage("validation: plans", outcomes.runs(len(front), len(validation)))
        more, missed = outcomes.measure(subject, front, validation, tick, memory)
        seen, failed = [*more, *seen], [*missed, *failed]
        if not seen:
            raise ValueError(f"no setting could run: {'; '.join(failed)}")
        tested = seen
        if test:
            again = _reported(seen, budget, settings.all_presets)
            tick = stage("test", outcomes.runs(len(again), len(test)))
            tested, missed = outcomes.measure(subject, again, test, tick, memory)
            failed += missed
            if not tested:
                raise ValueError(f"no setting could run on the last cases: {'; '.join(missed)}")
    known = {one.what: one for one in tested}
    best, met = budget.best([outcomes.timed_with(one, known[one.what]) for one in seen if one.what in known])
    chosen = known[best.what]
    failed += [f"{one.label}: {found.reasons[one.label]}" for one in _nowhere(found)]
    return TuneResult(
        subject, budget, chosen, met, tuple(tested), tuple(seen), tuple(failed), memory.about
    )  # fmt: skip


def about(subject: Subject) -> dict[str, Any]:
    """Where and with what is measured: what a recipe's evidence says of it."""
    weights = next(subject.targets[0].root.parameters())
    return {
        "machine": machine(subject), "torch": str(torch.__version__), "dtype": str(weights.dtype),
        "version": attn_plugins.__version__, "commit": commit(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def _check_again(subject: Subject, probes: Sequence[Probe]) -> None:
    """Forwards of the dense run must give the same once more, or all errors are of something else."""
    for probe in probes:
        off = subject.error(subject.again(probe), probe.dense)
        if not off < SAME:
            raise ValueError(
                f"a forward of the dense run gives something else when it is run again (off by {off:.2g}): a cache of "
                "features, or an adapter with a state of its own, must be turned off while tuning"
            )


def _nowhere(found: profile.Profile) -> list[Candidate]:
    """Candidates that stand in no place, and whose reason is known."""
    return [
        one for column, one in enumerate(found.candidates) if one.label in found.reasons and not found.taken(column)
    ]


def _reported(seen: Sequence[Outcome], budget: Budget, all_presets: bool) -> list[Plan | Single]:
    """What runs on the last cases: what no other beats, and what it stands beside."""
    presets = [one for one in seen if not one.tuned]
    worth = [*outcomes.best_of(seen), *(presets if all_presets else outcomes.best_of(presets)), budget.best(seen)[0]]
    worth += [budget.best(presets)[0]] if presets else []
    return list({one.label: one.what for one in worth}.values())


def _thinned(front: list[Plan], count: int, budget: Budget) -> list[Plan]:
    """`count` of a front: the one that should meet the budget, and others spread evenly, both ends among them."""
    if len(front) <= count:
        return front
    wanted = budget.nearest(front)
    spread = {round(place * (len(front) - 1) / max(count - 1, 1)) for place in range(count)}
    if wanted not in spread:
        spread.remove(min(spread, key=lambda place: abs(place - wanted)))
    return [front[place] for place in sorted({*spread, wanted})]


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
