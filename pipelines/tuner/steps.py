"""What an error at some moment of a run does to its end, which a dense run alone does not say: it is measured.

A candidate stands in all places for a part of the schedule at a time. What its result then lost, over what the profile
adds up to in that part, is the weight of that part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from attn_plugins.patching import patch
from attn_plugins.pipelines.tuner.candidates import Candidate
from attn_plugins.pipelines.tuner.profile import Profile
from attn_plugins.pipelines.tuner.subject import Ran, Subject, Tick

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
    subject: Subject, profile: Profile, case: Any, dense: Ran, *, parts: int = 3, tick: Tick = lambda name: None
) -> np.ndarray:
    """(GRID,) weights of errors over the schedule; ones where a run has no steps."""
    if not subject.has_steps:
        return np.ones(GRID)
    column = _representative(profile)
    curve = curves(profile)[:, :, column].sum(axis=1)
    found = np.ones(GRID)
    for part in range(parts):
        inside = slice(part * GRID // parts, (part + 1) * GRID // parts)
        with _everywhere(subject, profile.candidates[column], (part / parts, 1 - (part + 1) / parts)):
            lost = subject.size(subject.loss(subject.run(case).result, dense.result))
        tick("steps")
        foreseen = curve[inside].mean() / parts
        found[inside] = lost / foreseen if foreseen > 0 else 1.0
    return found


def curves(profile: Profile) -> np.ndarray:
    """(GRID, places, candidates): the errors at every point of the schedule, between the probes on a straight line."""
    points = (np.arange(GRID) + 0.5) / GRID
    flat = profile.error.reshape(len(profile.moments), -1)
    return np.stack([np.interp(points, profile.moments, row) for row in flat.T], axis=1).reshape(
        GRID, *profile.error.shape[1:]
    )


def inside(dense_steps: Sequence[float]) -> np.ndarray:
    """(GRID,) bool: the points that do not stay dense."""
    first, last = dense_steps
    points = (np.arange(GRID) + 0.5) / GRID
    return (points >= first) & (points < 1 - last)


def _representative(profile: Profile) -> int:
    """The candidate of middling error among those that stand in every place: neither nothing nor everything."""
    total = profile.error.sum(axis=(0, 1))
    known = [column for column in range(len(profile.candidates)) if not math.isnan(total[column])]
    whole = [column for column in known if profile.candidates[column].heads is None] or known
    if not whole:
        raise ValueError("no candidate can stand in every place of this model: name methods that can")
    return sorted(whole, key=lambda column: total[column])[len(whole) // 2]


def _everywhere(subject: Subject, candidate: Candidate, dense_steps: tuple[float, float]) -> Any:
    return patch(subject.obj, candidate.method, dense_steps=dense_steps, min_tokens=0, **candidate.options)
