"""Times of several sides, interleaved, by GPU events or a wall clock; medians and quantiles.

Between two calls the caches are flushed: the L2 of a GPU, all of a CPU's. Nothing but the call stands between the
events: no probe, no allocation of ours, no read-back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Mark = Callable[[], None]
Call = Callable[[Mark], object]  # calls its argument between two phases


@dataclass(frozen=True)
class Spread:
    """Milliseconds: the median, the .2 and .8 quantiles, of how many rounds."""

    ms: float
    low: float
    high: float
    rounds: int


def spread(samples: list[float]) -> Spread:
    values = torch.tensor(samples, dtype=torch.float64)
    median, low, high = values.quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
    return Spread(median, low, high, len(samples))


class GpuStopwatch:
    """Events around a call and between its phases, read only after the round."""

    def __init__(self, device: torch.device) -> None:
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self._flush = torch.empty(max(2 * l2, 128 << 20), dtype=torch.int8, device=device)
        self._events: list[torch.cuda.Event] = []

    def start(self) -> None:
        self._flush.zero_()
        self._events = []
        self.mark()

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def stop(self) -> Callable[[], list[float]]:
        """What reads the milliseconds of each phase, once the device is done."""
        self.mark()
        events = self._events
        return lambda: [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]

    def wait(self) -> None:
        torch.cuda.synchronize()


class WallStopwatch:
    """A CPU's clock. With `flush`, bytes of memory that are written before each call, so that it finds cold caches."""

    def __init__(self, flush: int = 0) -> None:
        self._flush = torch.zeros(flush, dtype=torch.int8)

    def start(self) -> None:
        self._flush.add_(1)
        self._marks: list[float] = []
        self.mark()

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def stop(self) -> Callable[[], list[float]]:
        self.mark()
        marks = self._marks
        return lambda: [1e3 * (b - a) for a, b in zip(marks, marks[1:], strict=False)]

    def wait(self) -> None:
        pass


Stopwatch = GpuStopwatch | WallStopwatch


def stopwatch(device: torch.device, cold: bool = False) -> Stopwatch:
    """`cold`: flush a CPU's caches, too (a GPU's always are; a dry run on a CPU need not)."""
    if device.type == "cuda":
        return GpuStopwatch(device)
    return WallStopwatch(2 * cache_bytes() if cold else 0)


def cache_bytes() -> int:
    """Of the largest cache of this processor; 64 MiB where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes) or 64 << 20


def interleaved(
    sides: Mapping[str, Call], watch: Stopwatch, seconds: float, least: int = 5, most: int = 101
) -> dict[str, list[list[float]]]:
    """Samples of each side: per phase, one number a round.

    Rounds go on for `seconds`, at least `least` and at most `most` of them. Every round begins with another side, so
    that none always follows the same neighbour.
    """
    names = list(sides)
    for name in names:  # warm
        sides[name](lambda: None)
    watch.wait()
    samples: dict[str, list[list[float]]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    rounds = 0
    while names and rounds < most and (rounds < least or time.perf_counter() < end):
        turn = rounds % len(names)
        readings = []
        for name in names[turn:] + names[:turn]:
            watch.start()
            sides[name](watch.mark)
            readings.append((name, watch.stop()))
        watch.wait()
        for name, read in readings:
            phases = read()
            samples[name] = samples[name] or [[] for _ in phases]
            for column, value in zip(samples[name], phases, strict=True):
                column.append(value)
        rounds += 1
    return samples
