"""Tokens a second, memory and prefill of Llamas with dense caches and with MoA's rings on this GPU, as CSV rows.

    python benchmarks/gpu_moa.py [--layers 8] [--compile] [--out benchmarks/results/gpu_moa.csv]

Models have the true shape and random weights. Three caches: transformers' dynamic and static one under SDPA, and
`patch(model, "moa", plan=...)` with a plan of half of the cache, its heads unlike, by a seed. `--compile` adds steps as
one graph, dense and with rings. Batches are the same for all, and the largest that each fits.

`tokens_per_s` is of decoding steps that end at `tokens`, timed from an idle device to an idle device, median of rounds
in which the sides take turns; the caches are filled with random numbers, for no side looks at them. `of_dynamic` and
`of_static` are ratios to these sides. `bytes_bound` is what the bytes of weights and cache allow beyond a dense static
cache of the same batch, `gb_per_s` the bytes of both over the time. `prefill_ms` is of a prompt of `tokens - 1`, one
item. -1: not measured, and `note` says why. Of quality these models say nothing: their weights are random.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attn_plugins.pipelines.benching import clocks, environment  # noqa: E402
from attn_plugins.pipelines.benching.cold import wall_ms  # noqa: E402
from benchmarks.gpu_moa_sides import (  # noqa: E402
    COMPILED,
    SHAPES,
    SIDES,
    Side,
    cache_bytes,
    cache_of,
    decode,
    entered,
    fill,
    random_llama,
    read_bytes,
    spread_plan,
)  # fmt: skip
from benchmarks.rows import Row, write_rows  # noqa: E402

MIB = 1 << 20
WARM = 4  # steps before the timed ones: kernels, graphs

Problem = tuple[str, int, str]  # model, tokens, a batch or "largest"


@dataclass
class Found:
    """Of one side in one problem."""

    batch: int
    step_ms: list[float] = field(default_factory=list)
    prefill_ms: list[float] = field(default_factory=list)
    cache_bytes: int = -1
    peak_bytes: int = -1
    prefill_peak_bytes: int = -1
    note: str = "-"


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.about = environment.describe(self.device)
        self.sides = (*SIDES, *(COMPILED if options.compile else ()))
        self.end = time.monotonic() + 60 * options.minutes
        self.model = functools.lru_cache(maxsize=1)(self._model)

    def _model(self, name: str) -> Any:
        o = self.options
        self._tidy()
        return random_llama(name, o.layers, max(o.tokens) + 1, o.tiny, torch.bfloat16, o.device)

    def measure(self, problem: Problem) -> list[Row]:
        """The rows of all sides; none when the time is over."""
        name, tokens, batch = problem
        if time.monotonic() > self.end:
            print(f"left out for lack of time: {name}, {tokens} tokens, batch {batch}", flush=True)
            return []
        model = self.model(name)
        config = model.config
        shape = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
        plan = spread_plan(*shape, self.options.share, self.options.seed)
        before = clocks.read(self.device)
        found = {}
        for side in self.sides:
            fits = functools.partial(self._fits, model, side, plan, tokens)
            found[side.name] = Found(largest(fits, self.options.most) if batch == "largest" else int(batch))
        for _ in range(self.options.rounds):
            for side in self.sides:
                one = found[side.name]
                if one.batch and one.note == "-":
                    self._one(model, side, plan, tokens, one, prefill=batch == "1" and not side.compiled)
        readings = clocks.both(before, clocks.read(self.device))
        torch._dynamo.reset()
        weights, dense = read_bytes(model), found["static"]
        about: Row = {"layers": shape[0], "plan_memory": round(plan.memory(tokens), 4)}
        about |= {"plan_pairs": round(plan.pair_fraction(tokens), 4), **readings}
        about |= {key: self.about[key] for key in ("gpu", "driver", "cuda", "triton")} | {"tree": self.about["commit"]}
        return [
            self._row(problem, side.name, found, weights, dense.cache_bytes / max(dense.batch, 1)) | about
            for side in self.sides
        ]

    def _one(self, model: Any, side: Side, plan: Any, tokens: int, one: Found, prefill: bool) -> None:
        """A round of a side; whatever it cannot do is its note, and the others go on."""
        try:
            with torch.no_grad(), entered(model, side, plan) as step:
                if prefill:
                    self._prefill(model, step, side, tokens, one)
                self._steps(model, step, side, tokens, one, self.options.steps)
        except Exception as error:
            text = str(error).strip().splitlines()
            one.note = f"{type(error).__name__}: {text[0] if text else ''}"[:160]
        self._tidy()

    def _steps(self, model: Any, step: Any, side: Side, tokens: int, one: Found, count: int) -> None:
        cache = cache_of(model, side, tokens)
        fill(model, cache, one.batch, tokens - WARM - count)
        token = torch.ones(one.batch, 1, dtype=torch.int64, device=self.device)
        token = decode(step, cache, token, WARM)
        self._tidy()
        ms = wall_ms(lambda: decode(step, cache, token, count), self.device)
        one.step_ms.append(ms / count)
        one.cache_bytes, one.peak_bytes = cache_bytes(cache), self._peak()

    def _prefill(self, model: Any, step: Any, side: Side, tokens: int, one: Found) -> None:
        ids = torch.ones(1, tokens - 1, dtype=torch.int64, device=self.device)

        def run() -> None:
            step(input_ids=ids, past_key_values=cache_of(model, side, tokens), use_cache=True, logits_to_keep=1)

        if not one.prefill_ms:  # kernels, plans
            run()
        self._tidy()
        one.prefill_ms.append(wall_ms(run, self.device))
        one.prefill_peak_bytes = self._peak()
        self._tidy()

    def _fits(self, model: Any, side: Side, plan: Any, tokens: int, batch: int) -> bool:
        """Whether two steps run. A compiled side is tried as it is without: it keeps the same."""
        self._tidy()
        try:
            plain = Side(side.name, side.rings, side.static)
            with torch.no_grad(), entered(model, plain, plan) as step:
                self._steps(model, step, plain, tokens, Found(batch), 2)
        except torch.OutOfMemoryError:
            return False
        return True

    def _row(self, problem: Problem, side: str, found: dict[str, Found], weights: int, dense: float) -> Row:
        one = found[side]
        rates = {name: _rate(other) for name, other in found.items()}
        rate = rates[side]
        held = weights + one.cache_bytes
        known = rate > 0 and dense > 0
        return {
            "model": problem[0], "tokens": problem[1], "batch": one.batch,
            "batches": "largest" if problem[2] == "largest" else "equal", "side": side,
            "tokens_per_s": round(rate, 2), "step_ms": round(_median(one.step_ms), 4), "rounds": len(one.step_ms),
            "of_dynamic": _ratio(rate, rates["dynamic"]), "of_static": _ratio(rate, rates["static"]),
            "bytes_bound": round((weights + dense * one.batch) / held, 3) if known else -1,
            "gb_per_s": round(held / _median(one.step_ms) / 1e6, 1) if rate > 0 else -1,
            "cache_mib": _mib(one.cache_bytes), "weights_mib": _mib(weights), "peak_mib": _mib(one.peak_bytes),
            "prefill_ms": round(_median(one.prefill_ms), 3), "prefill_peak_mib": _mib(one.prefill_peak_bytes),
            "note": one.note if one.batch else "not one item fits",
        }  # fmt: skip

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else -1

    def _tidy(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch up to `most` that fits, 0 if none does."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else -1.0


def _rate(one: Found) -> float:
    return 1e3 * one.batch / _median(one.step_ms) if one.step_ms else -1.0


def _ratio(rate: float, other: float) -> float:
    return round(rate / other, 3) if rate > 0 and other > 0 else -1


def _mib(size: int) -> float:
    return round(size / MIB, 1) if size >= 0 else -1


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["8b", "7b"])
    parser.add_argument("--layers", type=int, help="so many instead of 32")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384, 8192, 32768])
    parser.add_argument("--batches", nargs="+", default=["1", "8", "largest"])
    parser.add_argument("--most", type=int, default=512, help="no larger batch is tried")
    parser.add_argument("--share", type=float, default=0.5, help="of the cache that the plan keeps")
    parser.add_argument("--seed", type=int, default=0, help="of the plan")
    parser.add_argument("--steps", type=int, default=32, help="timed ones of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further problem after so many")
    parser.add_argument("--compile", action="store_true", help="compiled steps too; compiling takes minutes")
    parser.add_argument("--out", type=Path, help="the CSV file")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # with --device cpu: a dry run
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    if options.device == "cpu":
        if not (options.tiny and options.out):
            raise SystemExit("--device cpu is a dry run: it needs --tiny and --out (its times are no results)")
        print("DRY RUN ON A CPU: the times below mean nothing and are no results.")
    elif not torch.cuda.is_available():
        raise SystemExit("no GPU that PyTorch can use: nothing to measure (torch.cuda.is_available() is False)")
    bench = Bench(options)
    problems = [(name, n, batch) for name in options.models for n in options.tokens for batch in options.batches]
    write_rows(problems, bench.measure, options.out or Path(__file__).resolve().parent / "results" / "gpu_moa.csv")


if __name__ == "__main__":
    main()
