"""What each candidate does at each place: its error in a model's own output, and the time that its attention takes.

One place at a time is patched in a forward that a dense run has made before, so that what the rest of the model makes
of the error is part of it. A profile that was cut short goes on where it stopped (tuner/memory.py).
"""

from __future__ import annotations

import functools
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attn_plugins.patching import patch
from attn_plugins.pipelines.stopwatch import Dense, Stopwatch, TimedProcessor, attach
from attn_plugins.pipelines.tuner import rows
from attn_plugins.pipelines.tuner.candidates import Candidate, at
from attn_plugins.pipelines.tuner.memory import Memory, mark
from attn_plugins.pipelines.tuner.subject import Place, Probe, Subject, Tick, sentence

REPEATS = 3  # of the dense forwards: their times are what all others are held against


@dataclass(frozen=True)
class Profile:
    """`error` (probes, places, candidates): of one forward with one place patched, nan where it cannot be.

    `seconds` (places, candidates), `dense` (places,): of a place's attention, in one forward. `moments` (probes,):
    where the probes are in a run, 0 to 1. `reasons`: by label, why a candidate could not stand somewhere.
    """

    places: tuple[Place, ...]
    candidates: tuple[Candidate, ...]
    moments: np.ndarray
    error: np.ndarray
    seconds: np.ndarray
    dense: np.ndarray
    reasons: Mapping[str, str] = field(default_factory=dict)

    def taken(self, column: int) -> bool:
        """Whether a candidate stands anywhere."""
        return not bool(np.isnan(self.error[:, :, column]).any(axis=0).all())


def measure(
    subject: Subject,
    candidates: Sequence[Candidate],
    probes: Sequence[Probe],
    *,
    groups: int | None = None,
    memory: Memory | None = None,
    tick: Tick = lambda name: None,
) -> Profile:
    """Profile all candidates.

    Args:
        groups: the places are taken together in so many runs of neighbours, whose members share what is measured, so
            that a deep model takes fewer forwards; None: each by itself.
        memory: what it holds of the same places, candidates and probes is not measured again.
        tick: called after each forward.
    """
    reasons: dict[str, str] = {}
    memory = memory or Memory()
    marks = [f"{probe.at:.4f} {mark(probe.dense)}" for probe in probes]
    shape = (len(probes), len(subject.places), len(candidates))
    error, seconds = np.full(shape, np.nan), np.full(shape, np.nan)

    def dense(when: str) -> list[float | None]:
        return memory.of("|".join(("dense", when, *marks)), lambda: _dense_seconds(subject, probes, tick))

    before = dense("before")
    for members in _runs(subject.places, groups):
        names = [place.name for place in members]
        indices = [subject.places.index(place) for place in members]
        for column, candidate in enumerate(candidates):
            for number, probe in enumerate(probes):
                key = "|".join((*names, candidate.label, mark(candidate.options), marks[number]))
                measured = functools.partial(_one, subject, candidate, names, probe, repeats(len(probes)), reasons)
                found, time = (math.nan if value is None else value for value in memory.of(key, measured))
                tick(candidate.label)
                if math.isnan(found):
                    break
                error[number, indices, column] = found / len(members)
                seconds[number, indices, column] = time / len(members)
    unknown = np.isnan(error).any(axis=0)
    error[:, unknown], seconds[:, unknown] = np.nan, np.nan
    times = np.array([before, dense("after")], dtype=float).mean(axis=0)
    moments = np.array([probe.at for probe in probes])
    return Profile(subject.places, tuple(candidates), moments, error, np.median(seconds, axis=0), times, reasons)


def repeats(probes: int) -> int:
    """Forwards of each cell and probe, so that a time is a median of three: the first of a layer may be slow."""
    return math.ceil(REPEATS / probes)


def forwards(places: Sequence[Place], candidates: int, probes: int, groups: int | None = None) -> int:
    """How many ticks `measure` takes at most."""
    return len(_runs(places, groups)) * candidates * probes + 2 * REPEATS * probes


def _one(
    subject: Subject, candidate: Candidate, names: list[str], probe: Probe, count: int, reasons: dict[str, str]
) -> tuple[float | None, float | None]:
    """(error, seconds of attention) of a forward; None, and a reason in `reasons`, where the candidate does not take it
    or would be dense attention."""
    watch, times, error = Stopwatch(), [], math.nan
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            handle = at(subject, candidate, names)
            try:
                attach(watch, handle)
                for number in range(count):
                    output = subject.again(probe)
                    times.append(watch.lap())
                    if number == 0:
                        error = subject.error(output, probe.dense)
                        if rows.density(handle, len(names)) == 1:
                            raise ValueError("sees everything at this size")
            finally:
                handle.remove()
        if not math.isfinite(error):
            raise ValueError("gave numbers that are not finite")
    except (ValueError, TypeError, RuntimeError) as why:  # runtime.Refused, and a device without memory, are the last
        reasons.setdefault(candidate.label, sentence(why))
        return None, None
    return error, statistics.median(times)


def _dense_seconds(subject: Subject, probes: Sequence[Probe], tick: Tick) -> list[float]:
    """(places,): medians over forwards, each place with a clock of its own."""
    laps: list[list[float]] = [[] for _ in subject.places]
    with patch(subject.obj, Dense(), min_tokens=0) as handle:
        clocks = {place.name: Stopwatch() for place in subject.places}
        for patched in handle.patches:
            for layer in patched.layers:
                if layer.name in clocks:
                    timed: Any = TimedProcessor(layer.processor, clocks[layer.name])
                    layer.processor = timed
        for _ in range(REPEATS):
            for probe in probes:
                subject.again(probe)
                for row, place in enumerate(subject.places):
                    laps[row].append(clocks[place.name].lap())
                tick("dense")
    return [statistics.median(row) for row in laps]


def _runs(places: Sequence[Place], groups: int | None) -> list[list[Place]]:
    """Neighbours of one kind, in `groups` runs in all where the kinds allow it."""
    size = 1 if groups is None else math.ceil(len(places) / max(groups, 1))
    runs: list[list[Place]] = []
    for place in places:
        if runs and runs[-1][0].kind == place.kind and len(runs[-1]) < size:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs
