"""One case in one setting: the contest of its sides, and the rows that come of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import torch

from attn_plugins.pipelines.benching import memory
from attn_plugins.pipelines.benching.contest import Budget, Outcome, contest
from attn_plugins.pipelines.benching.sides import DTYPE_NAMES, Prepared, Setting
from benchmarks.gpu_suite.case import Case
from benchmarks.gpu_suite.columns import Row, derived


def measure(case: Case, setting: Setting, budget: Budget, training: bool, say: Callable[[str], None]) -> Iterator[Row]:
    """The rows of every side: forward, then (`training`) backward alone and both together.

    A side that cannot run the case, or gives a wrong result, has rows with -1 and a note that says why.
    """
    prepared = case.prepare(setting)
    for gradients in (False, True) if training else (False,):
        held = contest(prepared, setting, budget, gradients, say)
        for one in held.outcomes:
            for direction in held.directions:
                taken = one.time(direction)
                row = _about(case, setting, prepared, direction) | _outcome(one) | held.readings
                row |= {
                    "ms": taken.ms, "p20_ms": taken.low, "p80_ms": taken.high, "rounds": taken.rounds,
                    "index_ms": one.index_ms, "extra_mib": one.extra_mib,
                }  # fmt: skip
                yield row | derived(row, *held.baseline(direction))
    torch._dynamo.reset()  # compiled peers have a graph per mask, and the compiler a limit of graphs
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


def _about(case: Case, setting: Setting, prepared: Prepared, direction: str) -> Row:
    passes, aim = case.marks.get(direction, (-1.0, -1.0))
    return {
        "suite": case.suite, "case": case.name, "shape": case.shape, "option": case.option, "tokens": case.tokens,
        "batch": case.batch, "heads": case.heads, "kv_heads": case.kv_heads or case.heads,
        "head_dim": setting.head_dim, "dtype": DTYPE_NAMES[setting.dtype], "direction": direction,
        "work": prepared.work, "pass": passes, "aim": aim,
        "qkv_mib": sum(t.numel() * t.element_size() for t in prepared.leaves[:3]) / memory.MIB,
    }  # fmt: skip


def _outcome(one: Outcome) -> Row:
    error, allowed = one.verdict.worst[1:] if one.verdict else (-1.0, -1.0)
    return {
        "side": one.side.name, "role": one.side.role, "density": one.density, "error": error, "allowed": allowed,
        "note": one.note,
    }  # fmt: skip
