"""The sides of one problem against each other: check every one, time the right ones in turn, weigh memory and index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from attn_plugins.pipelines.benching import clocks, cold, memory
from attn_plugins.pipelines.benching.sides import (
    BACKWARD,
    FORWARD,
    TRAINING,
    Built,
    Cannot,
    Prepared,
    Setting,
    Side,
    Verdict,
)
from attn_plugins.pipelines.benching.timing import Call, Mark, Spread, interleaved, spread, stopwatch

MISSING = Spread(-1.0, -1.0, -1.0, -1)


@dataclass(frozen=True)
class Budget:
    """Seconds of timed rounds for a direction, and the least and most rounds."""

    seconds: float = 2.0
    least: int = 7
    most: int = 101


@dataclass
class Outcome:
    """A side after the contest: what it built, whether it was right, its times, and why it is out, if it is.

    `refused`: it said so itself. `index_ms`: what a first call costs beyond a steady one. `extra_mib`: the peak of a
    call's memory beyond its tensors.
    """

    side: Side
    built: Built | None = None
    verdict: Verdict | None = None
    note: str = ""
    refused: bool = False
    times: dict[str, Spread] = field(default_factory=dict)
    index_ms: float = -1.0
    extra_mib: float = -1.0

    @property
    def density(self) -> float:
        return self.built.density if self.built else -1.0

    def time(self, direction: str) -> Spread:
        return self.times.get(direction, MISSING)


@dataclass(frozen=True)
class Contest:
    """The outcomes of all sides in some directions; `best`: the dense ones that were the fastest of their kind."""

    outcomes: list[Outcome]
    directions: tuple[str, ...]
    best: tuple[str, ...]
    readings: dict[str, float]

    def baseline(self, direction: str) -> tuple[str, float]:
        """Name and milliseconds of the fastest dense side; ("-", -1) where none ran."""
        times = {one.side.name: one.time(direction).ms for one in self.outcomes if one.side.name in self.best}
        name = min(times, key=lambda name: times[name], default="-")
        return name, times.get(name, -1.0)


def contest(
    prepared: Prepared,
    setting: Setting,
    budget: Budget,
    gradients: bool,
    say: Callable[[str], None] = lambda text: None,
    cold_caches: bool = False,
) -> Contest:
    """Forward, or (`gradients`) backward alone and both together.

    A side that cannot run, or gives a wrong result, is not timed, and its note says why. `cold_caches`: flush those of
    a CPU before each call, and look at its memory; a GPU's are always flushed, and its memory is always looked at.
    """
    outcomes = [_entered(Outcome(side), prepared, gradients) for side in prepared.sides]
    for one in outcomes:
        if one.note and not one.refused:
            say(f"  {one.side.name}: {one.note}")
    calls = {o.side.name: timed_call(o.built, prepared, gradients) for o in outcomes if o.built and not o.note}
    directions = (BACKWARD, TRAINING) if gradients else (FORWARD,)
    watch = stopwatch(setting.device, cold_caches)
    dense = {o.side.name: calls[o.side.name] for o in outcomes if o.side.role == "dense" and o.side.name in calls}
    rest = {name: call for name, call in calls.items() if name not in dense}
    heat = replace(budget, seconds=budget.seconds / 2, least=min(budget.least, 5))
    times = _times(interleaved(dense, watch, heat.seconds, heat.least, heat.most), directions) if len(dense) > 1 else {}
    # Only the fastest dense kernels go on: the slow ones would eat the time of all. Their times come from this heat.
    best = {min(dense, key=lambda name: times[name][d].ms) for d in directions} if times else set(dense)
    before = clocks.read(setting.device)
    final = {**{name: dense[name] for name in sorted(best)}, **rest}
    times |= _times(interleaved(final, watch, budget.seconds, budget.least, budget.most), directions)
    readings = clocks.both(before, clocks.read(setting.device))
    for one in outcomes:
        name = one.side.name
        if name in times:
            one.times = times[name]
            one.index_ms = _index_ms(one, prepared, setting, gradients)
            call = calls[name]
            one.extra_mib = memory.peak_mib(lambda: call(lambda: None), setting.device, cold_caches)  # noqa: B023
    return Contest(outcomes, directions, tuple(sorted(best)), readings)


def _entered(one: Outcome, prepared: Prepared, gradients: bool) -> Outcome:
    """Build the side and run it once; all but the dense ones are compared with the oracle."""
    try:
        one.built = one.side.build()
        if one.side.role == "dense":
            timed_call(one.built, prepared, gradients)(lambda: None)
        else:
            one.verdict = prepared.oracle.judge(one.built.run, gradients)
            if not one.verdict.right:
                name, error, allowed = one.verdict.worst
                one.note = f"WRONG: {name} is off by {error:.2e}, allowed {allowed:.2e}; not timed"
    except Exception as error:  # whatever a side cannot do is a -1 with its reason; the others go on
        one.note, one.refused = reason(error), isinstance(error, (Cannot, ImportError, NotImplementedError))
    return one


def reason(error: Exception) -> str:
    """The first line of an error, short enough for a cell; its kind too, unless it is one of our own refusals."""
    text = str(error).strip().splitlines()
    kind = "" if isinstance(error, Cannot) else f"{type(error).__name__}: "
    return f"{kind}{text[0] if text else ''}"[:160]


def timed_call(built: Built, prepared: Prepared, gradients: bool) -> Call:
    """The timed call: one phase, or two (forward, backward)."""
    leaves = [t.detach().requires_grad_(gradients) for t in prepared.leaves]

    def forward(mark: Mark) -> object:
        with torch.no_grad():
            return built.run(*leaves)

    def training(mark: Mark) -> object:
        out = built.run(*leaves)
        mark()
        return out.detach(), *torch.autograd.grad(out, leaves, prepared.upstream, allow_unused=True)

    return training if gradients else forward


def _times(samples: dict[str, list[list[float]]], directions: tuple[str, ...]) -> dict[str, dict[str, Spread]]:
    """By side and direction. Of two phases the second is the backward, the sum is both."""
    found: dict[str, dict[str, Spread]] = {}
    for name, phases in samples.items():
        if directions == (FORWARD,):
            found[name] = {FORWARD: spread(phases[0])}
        else:
            total = [sum(pair) for pair in zip(*phases, strict=True)]
            found[name] = {BACKWARD: spread(phases[1]), TRAINING: spread(total)}
    return found


def _index_ms(one: Outcome, prepared: Prepared, setting: Setting, gradients: bool) -> float:
    """What a first call costs beyond a steady one. (The backward's part of an index is made in the forward's call or
    in its own; both are in the one number of a training call.)
    """
    if one.side.role == "dense":
        return 0.0
    cold.forget_plans()
    if not one.side.lazy:
        return cold.wall_ms(one.side.build, setting.device)
    whole = cold.wall_ms(lambda: timed_call(one.side.build(), prepared, gradients)(lambda: None), setting.device)
    return max(whole - max(taken.ms for taken in one.times.values()), 0.0)
