"""Which kernel configuration is fastest on this GPU: what to write into the table of the kernels' configs.

Each kernel is tried alone, the others as the table has them. A configuration that fails to compile, does not fit, or
gives a wrong result is left out and named.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from attn_plugins.pipelines.benching.contest import timed_call
from attn_plugins.pipelines.benching.sides import DTYPE_NAMES, Prepared, Setting
from attn_plugins.pipelines.benching.timing import interleaved, spread, stopwatch
from benchmarks.gpu_cases import all_cases, chosen

DEFAULT = ["hunyuan-18x24x24-s16x8x8", "random-33k-0.1"]
TILES = ((128, 128), (128, 64), (128, 32), (64, 128), (64, 64), (64, 32), (32, 64))
WARPS, STAGES = (4, 8), (2, 3, 4)


@dataclass(frozen=True)
class Trial:
    """A configuration and its milliseconds; -1 with the reason where it has none."""

    config: Any
    ms: float
    note: str = ""


def candidates() -> list[tuple[int, int, int, int]]:
    """(block_m, block_n, warps, stages): what fits somewhere and is not absurd, 128 x 128 with 4 warps for one."""
    return [
        (*tile, warps, stages)
        for tile, warps, stages in itertools.product(TILES, WARPS, STAGES)
        if not (tile[0] * tile[1] >= 128 * 128 and warps < 8) and not (tile[0] * tile[1] <= 64 * 32 and warps > 4)
    ]


def tried(configs: Iterable[Any], time_one: Callable[[Any], float]) -> list[Trial]:
    """All configurations, fastest first; those that raise come last."""
    trials = []
    for config in configs:
        try:
            trials.append(Trial(config, time_one(config)))
        except Exception as error:  # out of shared memory, a compiler fault, a wrong result: all mean "not this one"
            text = str(error).strip().splitlines()
            trials.append(Trial(config, -1.0, f"{type(error).__name__}: {text[0] if text else ''}"[:120]))
    return sorted(trials, key=lambda trial: (trial.ms < 0, trial.ms))


def sweep(options: argparse.Namespace, console: Console) -> int:
    """Print the fastest configurations of each case, precision, head size and kernel. They belong to this GPU's target.

    Raises:
        SystemExit: Triton has no GPU here.
    """
    from attn_plugins.ops.block_sparse.triton import configs
    from attn_plugins.ops.target import triton_target

    target = triton_target()
    if target is None or (target == "interpreter" and not options.tiny):
        raise SystemExit(f"--sweep: Triton has no GPU to run on here (its target is {target})")
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    for case in chosen(all_cases(), options.only or DEFAULT, quick=False):
        case = case.shrunk() if options.tiny else case
        for name, dim in itertools.product(options.dtypes, options.dims or case.head_dims):
            setting = Setting(dtypes[name], dim, torch.device(options.device), options.tiny)
            prepared = case.prepare(setting)
            for kernel in configs.KERNELS:
                now = configs.choose(kernel, target, setting.dtype, dim)
                others = (configs.Config(*row) for row in candidates())

                def time_one(config: Any) -> float:
                    with configs.override(target, setting.dtype, dim, **{kernel: config}):  # noqa: B023
                        return _ms(prepared, options.seconds or 0.3, training=kernel != "forward")  # noqa: B023

                trials = tried([now, *(config for config in others if config != now)], time_one)
                _print(console, f"{case.name} {name} D{dim} {kernel}", now, trials)
    return 0


def _ms(prepared: Prepared, seconds: float, training: bool) -> float:
    """Of our side: the forward's, or the backward's alone.

    Raises:
        ValueError: a wrong result.
    """
    built = next(side for side in prepared.sides if side.role == "ours").build()
    verdict = prepared.oracle.judge(built.run, training)
    if not verdict.right:
        name, error, allowed = verdict.worst
        raise ValueError(f"wrong: {name} is off by {error:.2e}, allowed {allowed:.2e}")
    watch = stopwatch(prepared.leaves[0].device)
    phases = interleaved({"ours": timed_call(built, prepared, training)}, watch, seconds)["ours"]
    return spread(phases[-1]).ms


def _print(console: Console, label: str, now: Any, trials: list[Trial]) -> None:
    current = next(trial for trial in trials if trial.config == now)
    lines = [f"{label}: best {trials[0].config} {trials[0].ms:.3f} ms; in the table {now} {current.ms:.3f} ms"]
    lines += [f"    {trial.ms:.3f} ms {trial.config}" for trial in trials[1:6] if trial.ms > 0]
    failed = [trial for trial in trials if trial.ms < 0]
    lines += [f"    {len(failed)} left out, the first: {failed[0].note}"] if failed else []
    for line in lines:
        console.print(line, highlight=False, markup=False)
