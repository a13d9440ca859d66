"""What each candidate does at each place: its error in a model's own output, and the time that its attention takes.

One place at a time is patched in a forward that a dense run has made before, so that what the rest of the model makes
of the error is part of it. Kept in a file as it grows; a profile that was cut short goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attn_plugins.patching import patch
from attn_plugins.pipelines.stopwatch import Dense, Stopwatch, TimedProcessor, attach
from attn_plugins.pipelines.tuner.candidates import Candidate, at, refused
from attn_plugins.pipelines.tuner.subject import Place, Probe, Subject, Tick

REPEATS = 3  # of the dense forwards: their times are what all others are held against


@dataclass(frozen=True)
class Profile:
    """`error` (probes, places, candidates): of one forward with one place patched, nan where it cannot be.

    `seconds` (places, candidates), `dense` (places,): of a place's attention, in one forward. `moments` (probes,):
    where the probes are in a run, 0 to 1.
    """

    places: tuple[Place, ...]
    candidates: tuple[Candidate, ...]
    moments: np.ndarray
    error: np.ndarray
    seconds: np.ndarray
    dense: np.ndarray


def measure(
    subject: Subject,
    candidates: Sequence[Candidate],
    probes: Sequence[Probe],
    *,
    groups: int | None = None,
    path: Path | None = None,
    tick: Tick = lambda name: None,
) -> Profile:
    """Profile all candidates.

    Args:
        groups: the places are taken together in so many runs of neighbours, whose members share what is measured, so
            that a deep model takes fewer forwards; None: each by itself.
        path: of the file; what it holds of the same places and candidates is not measured again.
        tick: called after each forward.
    """
    known = _read(path)
    # another model, prompt or size in the same folder has other outputs, and so other keys
    marks = [f"{probe.at:.4f} {float(probe.dense.double().square().sum()):.12e}" for probe in probes]
    dense = _dense_seconds(subject, probes, tick)
    shape = (len(probes), len(subject.places), len(candidates))
    error, seconds = np.full(shape, np.nan), np.full((*shape[1:], len(probes)), np.nan)
    whole = _whole(subject, candidates, probes[0])
    for members in _runs(subject.places, groups):
        names = [place.name for place in members]
        rows = [subject.places.index(place) for place in members]
        for column, candidate in enumerate(candidates):
            if candidate.label not in whole[members[0].kind]:
                continue
            for number, probe in enumerate(probes):
                key = "|".join((*names, candidate.label, marks[number]))
                if key not in known:
                    known[key] = _one(subject, candidate, names, probe)
                    _write(path, known)
                tick(candidate.label)
                found, time = known[key]
                error[number, rows, column] = found / len(rows)
                seconds[rows, column, number] = time / len(rows)
    times = np.array([[_median(cell) for cell in row] for row in seconds])
    moments = np.array([probe.at for probe in probes])
    return Profile(subject.places, tuple(candidates), moments, error, times, dense)


def forwards(places: Sequence[Place], candidates: int, probes: int, groups: int | None = None) -> int:
    """How many ticks `measure` takes at most."""
    return len(_runs(places, groups)) * candidates * probes + REPEATS * probes


def _one(subject: Subject, candidate: Candidate, names: list[str], probe: Probe) -> tuple[float, float]:
    """(error, seconds of attention) of one forward; nan where the candidate does not take it."""
    try:
        handle = at(subject, candidate, names)
    except ValueError:
        return math.nan, math.nan
    watch = Stopwatch()
    try:
        attach(watch, handle)
        error = subject.error(subject.again(probe), probe.dense)
    except RuntimeError as refusal:
        if type(refusal).__name__ != "Refused":
            raise
        return math.nan, math.nan
    finally:
        handle.remove()
    return error, watch.seconds


def _dense_seconds(subject: Subject, probes: Sequence[Probe], tick: Tick) -> np.ndarray:
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
    return np.array([statistics.median(row) for row in laps])


def _whole(subject: Subject, candidates: Sequence[Candidate], probe: Probe) -> dict[str, set[str]]:
    """By kind of place: the labels of the candidates that run at the first such place."""
    found: dict[str, set[str]] = {}
    for place in subject.places:
        if place.kind not in found:
            fitting = [one for one in candidates if refused(subject, one, place, probe) is None]
            found[place.kind] = {one.label for one in fitting}
    return found


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


def _median(cells: np.ndarray) -> float:
    known = [float(cell) for cell in cells if not math.isnan(cell)]
    return statistics.median(known) if known else math.nan


def _read(path: Path | None) -> dict[str, tuple[float, float]]:
    if path is None or not path.is_file():
        return {}
    return {key: (row[0], row[1]) for key, row in json.loads(path.read_text(encoding="utf-8")).items()}


def _write(path: Path | None, known: dict[str, tuple[float, float]]) -> None:
    if path is not None:
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(known), encoding="utf-8")
        unfinished.replace(path)
