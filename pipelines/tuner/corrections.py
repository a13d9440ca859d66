"""What presets lost and saved in real runs against what the profile foresaw of them.

A profile sees one layer at a time, and one forward: errors do not quite add up over layers and steps, and not alike for
all methods, and clocks around layers are not the clock of a run. The presets ran on the validation cases anyway, so
each method's errors are scaled to what its presets really lost, and all savings to what all presets really saved.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator

import numpy as np

from attn_plugins import registry
from attn_plugins.pipelines.tuner.candidates import Candidate, Single
from attn_plugins.pipelines.tuner.outcomes import Outcome
from attn_plugins.pipelines.tuner.profile import Profile
from attn_plugins.pipelines.tuner.steps import GRID, curves, inside
from attn_plugins.pipelines.tuner.subject import Subject

LEAST_SAVED = 0.05  # of a run: less says nothing beside the noise of its time
MOST = 10.0  # a factor beyond it, or below its inverse, is of something else than errors that add up


def scales(subject: Subject, profile: Profile, weights: np.ndarray, outcomes: Iterable[Outcome]) -> np.ndarray:
    """(candidates,): factors of the errors of a profile. A candidate that is a preset's setting has that of its
    presets; any other the geometric mean of its method's; 1 where nothing is known."""
    places = np.nan_to_num(curves(profile) * weights[:, None, None]).sum(axis=1)
    own: dict[Candidate, list[float]] = {}
    methods: dict[str, list[float]] = {}
    for outcome, column, sparse in _foreseeable(subject, profile, outcomes):
        candidate = profile.candidates[column]
        expected = float((places[:, column] * sparse).mean())
        lost = statistics.fmean(subject.size(loss) for loss in outcome.losses)
        if expected > 0 and 1 / MOST <= lost / expected <= MOST:
            own.setdefault(candidate, []).append(lost / expected)
            methods.setdefault(candidate.method, []).append(lost / expected)
    found = np.ones(len(profile.candidates))
    for column, candidate in enumerate(profile.candidates):
        known = own.get(candidate.of or candidate) or methods.get(candidate.method)
        if known:
            found[column] = statistics.geometric_mean(known)
    return found


def savings(subject: Subject, profile: Profile, outcomes: Iterable[Outcome], share: float) -> float:
    """What presets saved of a run, over what the profile foresaw, the median; 1 where none tells.

    share: of attention in a dense run, by the profile's clocks.
    """
    dense = float(profile.dense.sum())
    found = []
    for outcome, column, sparse in _foreseeable(subject, profile, outcomes):
        times = profile.seconds[:, column]
        foreseen = share * sparse.mean() * float(np.where(np.isnan(times), 0, profile.dense - times).sum()) / dense
        if foreseen > LEAST_SAVED:
            found.append((1 - 1 / outcome.speedup) / foreseen)
    return min(max(statistics.median(found), 1 / MOST), MOST) if found else 1.0


def scaled(profile: Profile, factors: np.ndarray) -> Profile:
    """The profile with its errors multiplied by factors (candidates,)."""
    return dataclasses.replace(profile, error=profile.error * factors)


def _foreseeable(
    subject: Subject, profile: Profile, outcomes: Iterable[Outcome]
) -> Iterator[tuple[Outcome, int, np.ndarray]]:
    """(outcome of a preset, the column of its settings, the points (GRID,) where they are not dense)."""
    for outcome in outcomes:
        what = outcome.what
        candidate = _candidate(subject, profile, what) if isinstance(what, Single) else None
        if candidate is not None and isinstance(what, Single):
            sparse = inside(what.steps, subject.steps) if subject.has_steps else np.ones(GRID, bool)
            yield outcome, profile.candidates.index(candidate), sparse


def _candidate(subject: Subject, profile: Profile, single: Single) -> Candidate | None:
    """The candidate that a preset's settings are, where the preset has all places: some may be too small for it."""
    told, method = single.told, registry.method(single.method)
    least = max(told["min_tokens"], method.min_tokens[subject.device.type != "cpu"])
    sized = any(target.family.extras.get("min_tokens") for target in subject.targets)
    if told["layers"] is not None or sized or math.prod(subject.grid) < least:
        return None
    config = method.config_class.from_options(**told["options"])
    for candidate in profile.candidates:
        same = candidate.method == single.method and candidate.heads is None
        if same and method.config_class.from_options(**candidate.options) == config:
            return candidate
    return None
