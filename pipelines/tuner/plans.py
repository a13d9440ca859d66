"""From a profile to plans: which option each place takes, what that should cost and lose, and the recipe that it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_plugins import registry
from attn_plugins.pipelines.tuner import rows
from attn_plugins.pipelines.tuner.profile import Profile
from attn_plugins.pipelines.tuner.steps import curves, schedules
from attn_plugins.pipelines.tuner.subject import Subject
from attn_plugins.search import Choice, Problem, choose

POINTS = 16  # budgets between nothing and all that can be saved
MOST_SHARE = 0.95  # of a run that attention can be
MOST_COMBINATIONS = 20_000  # of settings over the head groups of a layer


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

    @property
    def told(self) -> list[dict[str, Any]]:
        """All that says what runs, in plain values."""
        return [dict(row) for row in self.rows]


def options_of(
    profile: Profile, weights: np.ndarray, *, has_steps: bool, steps: int | None = None
) -> list[list[Option]]:
    """The options of each place that no other beats in both time and error, quickest first; dense is the last.

    steps: of a run, where it has some and their number is known.

    Raises:
        ValueError: more combinations of settings over groups of heads than can be looked at.
    """
    errors = curves(profile) * weights[:, None, None]
    shares = schedules(steps) if has_steps else schedules(1)[:1]
    each = []
    for place in range(len(profile.places)):
        dense = float(profile.dense[place])
        found = [Option((), (0.0, 0.0), dense, 0.0)]
        for columns in _combinations(profile, place):
            seconds = _seconds(profile, place, columns)
            curve = errors[:, place, list(columns)].sum(axis=1)
            for stays, sparse in shares:
                share = sparse.mean()
                found.append(Option(columns, stays, dense + share * (seconds - dense), float((curve * sparse).mean())))
        each.append(_best(found))
    return each


def front(
    subject: Subject, profile: Profile, weights: np.ndarray, share: float, wanted: float | None = None
) -> list[Plan]:
    """Plans from the quickest to nearly dense, each the least error that its time allows (SciPy's HiGHS).

    share: of attention in a dense run. wanted: a speedup that is one of the budgets.
    """
    options = options_of(profile, weights, has_steps=subject.has_steps, steps=subject.steps)
    width = max(len(row) for row in options)
    padded = [[*row, *[row[-1]] * (width - len(row))] for row in options]
    # a place's cost is the mean's share of the dense run, so that their mean is what attention takes of it; clocks
    # around each layer may add up to more than the run
    most = min(share, MOST_SHARE)
    each = len(padded) * most / float(profile.dense.sum())
    costs = np.array([[[option.seconds * each for option in row] for row in padded]])
    losses = np.array([[[option.error for option in row] for row in padded]])
    least = costs.min(axis=2).mean()
    budgets = list(np.linspace(least, most, POINTS, endpoint=False))
    if wanted is not None and least < (exact := 1 / wanted - 1 + most) < most:
        budgets = sorted([*budgets, exact])
    known: list[Choice] = []
    for budget in budgets:
        problem = Problem(losses, costs, np.array([budget + 1e-9 * abs(budget)]))
        choice = choose(problem, known=known)
        if choice is not None and all(choice.options != one.options for one in known):
            known.append(choice)
    plans = []
    for number, choice in enumerate(known, 1):
        taken = [row[option] for row, option in zip(padded, choice.options, strict=True)]
        speedup = 1 / (1 - most + choice.costs[0])
        made = _rows(subject, profile, taken)
        if made:
            plans.append(Plan(f"tuned {number}", made, speedup, subject.root(choice.losses[0])))
    return plans


def _combinations(profile: Profile, place: int) -> list[tuple[int, ...]]:
    """Candidates alone, and those of one method that share out a place's heads, some of which may stay dense."""
    known = np.isfinite(profile.seconds[place]) & np.isfinite(profile.error[:, place]).all(axis=0)
    usable = [int(column) for column in np.flatnonzero(known)]
    found: list[tuple[int, ...]] = [(column,) for column in usable]
    parts: dict[str, dict[tuple[int, ...], list[int]]] = {}
    for column in usable:
        candidate = profile.candidates[column]
        if candidate.heads is not None:
            parts.setdefault(candidate.method, {}).setdefault(candidate.heads, []).append(column)
    for method, by_heads in parts.items():
        count = math.prod(len(group) + 1 for group in by_heads.values())
        if count > MOST_COMBINATIONS:
            raise ValueError(
                f"{method}: {count:,} ways to share out {len(by_heads)} groups of heads; take fewer head_groups"
            )
        for columns in itertools.product(*([None, *group] for group in by_heads.values())):
            chosen = tuple(column for column in columns if column is not None)
            if len(chosen) > 1 and all(known[_whole(profile, column)] for column in chosen):
                found.append(chosen)
    return found


def _seconds(profile: Profile, place: int, columns: tuple[int, ...]) -> float:
    """Of a place's attention: as measured of one candidate. Of several each takes its heads' share of its time on all
    heads, and the heads that stay dense what they took in the method's own hands: not what dense attention takes."""
    times = profile.seconds[place]
    if len(columns) == 1:
        return float(times[columns[0]])
    shares, dense = [], []
    for column in columns:
        candidate = profile.candidates[column]
        heads = profile.places[place].heads
        assert candidate.heads is not None and heads is not None  # candidates.on_head_groups
        share = len(candidate.heads) / heads
        whole = times[_whole(profile, column)]
        shares.append((share, whole))
        dense.append(max(times[column] - share * whole, 0.0) / (1 - share))
    rest = 1 - sum(share for share, _ in shares)
    return float(sum(share * whole for share, whole in shares) + rest * np.mean(dense))


def _whole(profile: Profile, column: int) -> int:
    """The column of the same setting on all heads."""
    of = profile.candidates[column].of
    assert of is not None
    return profile.candidates.index(of)


def _best(options: list[Option]) -> list[Option]:
    """Those that nothing beats in both, quickest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda one: (one.seconds, one.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def _rows(subject: Subject, profile: Profile, taken: list[Option]) -> tuple[dict[str, Any], ...]:
    """A row for each setting that some places share."""
    shared: dict[str, dict[str, Any]] = {}
    for place, option in zip(profile.places, taken, strict=True):
        if not option.columns:
            continue
        method, options = _setting(profile, option.columns)
        one = rows.row(subject, method, options, option.dense_steps, ())
        shared.setdefault(repr(one), one)["sites"].append(place.name)
    return tuple(shared.values())


def _setting(profile: Profile, columns: tuple[int, ...]) -> tuple[str, dict[str, Any]]:
    """(method, options) of the candidates that share out a place's heads, or of one."""
    parts = [profile.candidates[column] for column in columns]
    if len(parts) == 1:
        return parts[0].method, dict(parts[0].options)
    shares = [(part.heads, part.of.options) for part in parts if part.heads is not None and part.of is not None]
    options = registry.method(parts[0].method).on_heads(shares)
    assert options is not None  # each part was said by the same method
    return parts[0].method, options
