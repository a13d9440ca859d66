"""What an error at some moment of a run does to its end, which a dense run alone does not say: it is measured.

A candidate stands in all places for a part of the schedule at a time. What its result then lost, over what the profile
adds up to in that part, is the weight of that part.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from attn_plugins.pipelines.tuner.candidates import Candidate, at
from attn_plugins.pipelines.tuner.memory import Memory, mark
from attn_plugins.pipelines.tuner.profile import Profile
from attn_plugins.pipelines.tuner.subject import Ran, Subject, Tick
from attn_plugins.schedule import Schedule

GRID = 240  # points of the schedule that errors are added up over: a multiple of all parts that are in use
DENSE_STEPS = (
    (0.0, 0.0),
    (0.1, 0.0),
    (0.2, 0.0),
    (0.3, 0.0),
    (0.5, 0.0),
    (0.7, 0.0),
    (0.0, 0.25),
    (0.0, 0.5),
    (0.25, 0.25),
)


def weights(
    subject: Subject,
    profile: Profile,
    case: Any,
    dense: Ran,
    *,
    parts: int = 3,
    memory: Memory | None = None,
    tick: Tick = lambda name: None,
) -> np.ndarray:
    """(GRID,) weights of errors over the schedule; ones where a run has no steps."""
    if not subject.has_steps:
        return np.ones(GRID)
    memory = memory or Memory()
    total = subject.steps or GRID
    column = _representative(profile)
    there = ~np.isnan(profile.error[:, :, column]).any(axis=0)
    names = [place.name for place, takes in zip(profile.places, there, strict=True) if takes]
    curve = curves(profile)[:, there, column].sum(axis=1)
    candidate, found = profile.candidates[column], np.ones(GRID)
    parts = min(parts, total)
    for part in range(parts):
        stays = (part * total // parts, total - (part + 1) * total // parts)
        sparse = inside(stays, subject.steps)
        given = stays if subject.steps else (stays[0] / total, stays[1] / total)
        key = f"part {part} of {parts}|{candidate.label}|{mark(candidate.options)}|{mark(dense.result)}"
        lost = memory.of(key, functools.partial(_lost, subject, candidate, names, given, case, dense))[0]
        tick("steps")
        foreseen = (curve * sparse).mean()
        found[sparse] = lost / foreseen if foreseen > 0 and lost is not None else 1.0
    return found


def curves(profile: Profile) -> np.ndarray:
    """(GRID, places, candidates): the errors at every point of the schedule, between the probes on a straight line."""
    points = (np.arange(GRID) + 0.5) / GRID
    flat = profile.error.reshape(len(profile.moments), -1)
    return np.stack([np.interp(points, profile.moments, row) for row in flat.T], axis=1).reshape(
        GRID, *profile.error.shape[1:]
    )


def inside(dense_steps: Sequence[float], total: int | None) -> np.ndarray:
    """(GRID,) bool: the points that do not stay dense, in whole steps of a schedule of `total`.

    dense_steps: at the start and the end, as shares (floats) or steps (ints).
    """
    total = total or GRID
    first, last = dense_steps
    sparse = Schedule((first, last)).sparse_steps(total)
    steps = np.arange(GRID) * total // GRID
    return (steps >= sparse.start) & (steps < sparse.stop)


def schedules(total: int | None) -> list[tuple[tuple[float, float], np.ndarray]]:
    """What is tried: (dense steps, the points that do not stay dense), each range of steps once."""
    found: dict[bytes, tuple[tuple[float, float], np.ndarray]] = {}
    for dense_steps in DENSE_STEPS:
        sparse = inside(dense_steps, total)
        if sparse.any():
            found.setdefault(sparse.tobytes(), (dense_steps, sparse))
    return list(found.values())


def _representative(profile: Profile) -> int:
    """The candidate of middling error among those that stand in the most places: neither nothing nor everything."""
    takes = ~np.isnan(profile.error).any(axis=0)
    count, total = takes.sum(axis=0), np.nansum(profile.error, axis=(0, 1))
    whole = [column for column in range(len(profile.candidates)) if profile.candidates[column].heads is None]
    known = [column for column in whole if count[column] == count[whole].max() and total[column] > 0]
    if not known or not count[whole].max():
        raise ValueError("no candidate can stand in any place of this model, or none changes anything at this size")
    return sorted(known, key=lambda column: total[column])[len(known) // 2]


def _lost(
    subject: Subject, candidate: Candidate, names: list[str], dense_steps: Sequence[float], case: Any, dense: Ran
) -> tuple[float]:
    """(what a run loses with a candidate in some places, in the measure that adds up,)."""
    handle = at(subject, candidate, names, dense_steps, strict=False)
    try:
        return (subject.size(subject.loss(subject.run(case).result, dense.result)),)
    finally:
        handle.remove()
