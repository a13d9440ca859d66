"""Ratios of medians, the sides interleaved in one run: what drifts on a machine drifts for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    seconds: float = 3.0,
    least: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median milliseconds of each side, warmed up once; rounds go on for `seconds`, at least `least` of them.

    clock: `time.thread_time` counts what one thread computes, and not how long others had its processor.
    """
    for run in sides.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < least or time.perf_counter() < end:
        for name, run in sides.items():
            start = clock()
            run()
            times[name].append(1e3 * (clock() - start))
        if len(next(iter(times.values()))) >= 101:
            break
    return {name: statistics.median(row) for name, row in times.items()}
