"""From a profile to plans: which option each place takes, what that should cost and lose, and the recipe that it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_plugins import registry
from attn_plugins.pipelines.tuner.profile import Profile
from attn_plugins.pipelines.tuner.steps import DENSE_STEPS, curves, inside
from attn_plugins.pipelines.tuner.subject import Subject
from attn_plugins.search import Choice, Problem, choose

POINTS = 16  # budgets between nothing and all that can be saved


@dataclass(frozen=True)
class Option:
    """What a place may have. `columns`: candidates, several of disjoint heads; () is dense. `seconds`: of a forward's
    attention, the mean over the run; `error`: what it adds at the end."""

    columns: tuple[int, ...]
    dense_steps: tuple[float, float]
    seconds: float
    error: float


@dataclass(frozen=True, eq=False)
class Plan:
    """A choice for every place. `rows`: of its recipe. `speedup` of a whole run and `loss` are what is foreseen."""

    label: str
    rows: tuple[Mapping[str, Any], ...]
    speedup: float
    loss: float


def options_of(profile: Profile, weights: np.ndarray, *, has_steps: bool) -> list[list[Option]]:
    """The options of each place that no other beats in both time and error, quickest first; dense is the last."""
    errors = curves(profile) * weights[:, None, None]
    schedules = DENSE_STEPS if has_steps else DENSE_STEPS[:1]
    shares = [(steps, inside(steps)) for steps in schedules]
    rows = []
    for place in range(len(profile.places)):
        dense = float(profile.dense[place])
        found = [Option((), (0.0, 0.0), dense, 0.0)]
        for columns in _combinations(profile, place):
            seconds = sum(float(profile.seconds[place, column]) for column in columns) - (len(columns) - 1) * dense
            curve = errors[:, place, list(columns)].sum(axis=1)
            for steps, sparse in shares:
                share = sparse.mean()
                found.append(Option(columns, steps, dense + share * (seconds - dense), float((curve * sparse).mean())))
        rows.append(_best(found))
    return rows


def front(subject: Subject, profile: Profile, weights: np.ndarray, job: float, forwards: int) -> list[Plan]:
    """Plans from the quickest to nearly dense, each the least error that its time allows (SciPy's HiGHS).

    job: seconds of a dense run; forwards: of it.
    """
    options = options_of(profile, weights, has_steps=subject.has_steps)
    width = max(len(row) for row in options)
    padded = [[*row, *[row[-1]] * (width - len(row))] for row in options]
    # a place's cost is the mean's share of the dense run, so that their mean is what attention takes of it
    each = len(padded) * forwards / job
    costs = np.array([[[option.seconds * each for option in row] for row in padded]])
    losses = np.array([[[option.error for option in row] for row in padded]])
    scale = losses[losses > 0].min(initial=1.0)
    least, most = costs.min(axis=2).mean(), float(profile.dense.sum()) * forwards / job
    known: list[Choice] = []
    for budget in np.linspace(least, most, POINTS, endpoint=False):
        problem = Problem(losses / scale, costs, np.array([budget * (1 + 1e-9)]))
        choice = choose(problem, known=known)
        if choice is not None and all(choice.options != one.options for one in known):
            known.append(choice)
    plans = []
    for number, choice in enumerate(known, 1):
        taken = [row[option] for row, option in zip(padded, choice.options, strict=True)]
        speedup = 1 / (1 - most + choice.costs[0])
        rows = _rows(subject, profile, taken)
        if rows:
            plans.append(Plan(f"tuned {number}", rows, speedup, subject.root(choice.losses[0] * scale)))
    return plans


def _combinations(profile: Profile, place: int) -> list[tuple[int, ...]]:
    """Candidates alone, and those of one method that share out a place's heads, some of which may stay dense."""
    usable = [
        column
        for column in range(len(profile.candidates))
        if not math.isnan(profile.seconds[place, column]) and not np.isnan(profile.error[:, place, column]).any()
    ]
    found: list[tuple[int, ...]] = [(column,) for column in usable]
    parts: dict[str, dict[tuple[int, ...], list[int]]] = {}
    for column in usable:
        candidate = profile.candidates[column]
        if candidate.heads is not None:
            parts.setdefault(candidate.method, {}).setdefault(candidate.heads, []).append(column)
    for by_heads in parts.values():
        for columns in itertools.product(*([None, *group] for group in by_heads.values())):
            chosen = tuple(column for column in columns if column is not None)
            if len(chosen) > 1:
                found.append(chosen)
    return found


def _best(options: list[Option]) -> list[Option]:
    """Those that nothing beats in both, quickest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda one: (one.seconds, one.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def _rows(subject: Subject, profile: Profile, taken: list[Option]) -> tuple[dict[str, Any], ...]:
    """A row for each setting that some places share."""
    family = subject.targets[0].family.name
    shared: dict[str, dict[str, Any]] = {}
    for place, option in zip(profile.places, taken, strict=True):
        if not option.columns:
            continue
        method, options = _setting(profile, option.columns)
        first, last = option.dense_steps
        steps = [first, last] if last else first
        row = {"method": method, "family": family, "options": options, "dense_steps": steps, "sites": []}
        shared.setdefault(repr({**row, "sites": None}), row)["sites"].append(place.name)
    return tuple(shared.values())


def _setting(profile: Profile, columns: tuple[int, ...]) -> tuple[str, dict[str, Any]]:
    """(method, options) of the candidates that share out a place's heads, or of one."""
    parts = [profile.candidates[column] for column in columns]
    if len(parts) == 1:
        return parts[0].method, dict(parts[0].options)
    rows = [(part.heads, part.of.options) for part in parts if part.heads is not None and part.of is not None]
    options = registry.method(parts[0].method).on_heads(rows)
    assert options is not None  # each part was said by the same method
    return parts[0].method, options
