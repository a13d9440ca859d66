"""One case in one setting: check every side, time the right ones interleaved, and make the rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu_suite import clocks, cold, memory
from benchmarks.gpu_suite.case import BACKWARD, FORWARD, TRAINING, Built, Case, Prepared, Setting, Side, Verdict
from benchmarks.gpu_suite.columns import Row, derived
from benchmarks.gpu_suite.timing import Call, Mark, Spread, interleaved, spread, stopwatch

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Budget:
    """Seconds of timed rounds for a direction, and the least and most rounds."""

    seconds: float = 2.0
    least: int = 7
    most: int = 101


@dataclass
class Contender:
    """A side on its way through the checks: what it built, and why it is out, if it is."""

    side: Side
    built: Built | None = None
    verdict: Verdict | None = None
    note: str = ""

    @property
    def density(self) -> float:
        return self.built.density if self.built else -1.0


def measure(case: Case, setting: Setting, budget: Budget, training: bool, say: Callable[[str], None]) -> Iterator[Row]:
    """The rows of every side: forward, then (`training`) backward alone and both together.

    A side that cannot run the case, or gives a wrong result, has rows with -1 and a note that says why.
    """
    prepared = case.prepare(setting)
    for gradients in (False, True) if training else (False,):
        contenders = [_entered(Contender(side), prepared, setting, gradients) for side in prepared.sides]
        for one in contenders:
            if one.note:
                say(f"  {one.side.name}: {one.note}")
        yield from _rows(case, setting, prepared, contenders, budget, gradients)
    torch._dynamo.reset()  # compiled peers have a graph per mask, and the compiler a limit of graphs
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


def _entered(one: Contender, prepared: Prepared, setting: Setting, gradients: bool) -> Contender:
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
        text = str(error).strip().splitlines()
        one.note = f"{type(error).__name__}: {text[0] if text else ''}"[:160]
    return one


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


def _rows(
    case: Case, setting: Setting, prepared: Prepared, contenders: list[Contender], budget: Budget, gradients: bool
) -> Iterator[Row]:
    calls = {c.side.name: timed_call(c.built, prepared, gradients) for c in contenders if c.built and not c.note}
    directions = (BACKWARD, TRAINING) if gradients else (FORWARD,)
    watch = stopwatch(setting.device)
    dense = {c.side.name: calls[c.side.name] for c in contenders if c.side.role == "dense" and c.side.name in calls}
    rest = {name: call for name, call in calls.items() if name not in dense}
    heat = replace(budget, seconds=budget.seconds / 2, least=min(budget.least, 5))
    times = _times(interleaved(dense, watch, heat.seconds, heat.least, heat.most), directions)
    # Only the fastest dense kernels go on: the slow ones would eat the time of all. Their times come from this heat.
    best = {min(dense, key=lambda name: times[name][d].ms) for d in directions} if dense else set()
    before = clocks.read(setting.device)
    final = {**{name: dense[name] for name in sorted(best)}, **rest}
    times |= _times(interleaved(final, watch, budget.seconds, budget.least, budget.most), directions)
    readings = clocks.both(before, clocks.read(setting.device))

    for one in contenders:
        index = _index_ms(one, prepared, times[one.side.name], setting, gradients) if one.side.name in times else -1.0
        extra = -1.0
        if one.side.name in calls:
            extra = memory.peak_mib(lambda: calls[one.side.name](lambda: None), setting.device)  # noqa: B023
        for direction in directions:
            baseline = min(best, key=lambda name: times[name][direction].ms) if best else "-"  # noqa: B023
            taken = times.get(one.side.name, {}).get(direction, Spread(-1.0, -1.0, -1.0, -1))
            row = _about(case, setting, prepared, direction) | _outcome(one) | readings
            row |= {
                "ms": taken.ms, "p20_ms": taken.low, "p80_ms": taken.high, "rounds": taken.rounds,
                "index_ms": index, "extra_mib": extra,
            }  # fmt: skip
            yield row | derived(row, baseline, times[baseline][direction].ms if best else -1.0)


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


def _index_ms(one: Contender, prepared: Prepared, times: dict[str, Spread], setting: Setting, gradients: bool) -> float:
    """What a first call costs beyond a steady one. (The backward's part of an index is made in the forward's call or
    in its own; both are in the one number of a training call.)
    """
    if one.side.role == "dense":
        return 0.0
    cold.forget_plans()
    if not one.side.lazy:
        return cold.wall_ms(one.side.build, setting.device)
    whole = cold.wall_ms(lambda: timed_call(one.side.build(), prepared, gradients)(lambda: None), setting.device)
    return max(whole - max(taken.ms for taken in times.values()), 0.0)


def _about(case: Case, setting: Setting, prepared: Prepared, direction: str) -> Row:
    passes, aim = case.marks.get(direction, (-1.0, -1.0))
    return {
        "suite": case.suite, "case": case.name, "shape": case.shape, "option": case.option, "tokens": case.tokens,
        "batch": case.batch, "heads": case.heads, "kv_heads": case.kv_heads or case.heads,
        "head_dim": setting.head_dim, "dtype": DTYPE_NAMES[setting.dtype], "direction": direction,
        "work": prepared.work, "pass": passes, "aim": aim,
        "qkv_mib": sum(t.numel() * t.element_size() for t in prepared.leaves[:3]) / memory.MIB,
    }  # fmt: skip


def _outcome(one: Contender) -> Row:
    error, allowed = one.verdict.worst[1:] if one.verdict else (-1.0, -1.0)
    return {
        "side": one.side.name, "role": one.side.role, "density": one.density, "error": error, "allowed": allowed,
        "note": one.note,
    }  # fmt: skip
