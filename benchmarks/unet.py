"""A forward of an SDXL-shaped UNet: dense, patched, and by the peers, with Amdahl's bound, as CSV rows.

    python benchmarks/unet.py                                        # 1024 x 1024, bf16, three rounds
    python benchmarks/unet.py --pixels 2048 --rounds 1 --warm-pixels 256 \\
        --sides agent kv_pool tomesd_deeper todo --out benchmarks/results/unet_2048.csv
    python benchmarks/unet.py --device cuda --dtype fp16 --pixels 1024 2048 --rounds 20 --out gpu_unet.csv

Weights are random (a time does not depend on them; an error does: it says nothing about pictures). The sides are
interleaved, figures are medians, the first call of each is left out. tomesd is measured where it can be imported
(pip install --target FOLDER --no-deps tomesd==0.1.3, then PYTHONPATH=FOLDER); what a side cannot do is -1.

`attention_share`: self-attention's part of a dense forward, timed call by call (tokens differ by level: so is the cost
weighed). `cost`: what the side leaves of it, by operations. `bound`: 1 / (1 - share + share * cost), the most that the
attention alone can bring (tomesd saves projections too). `rel_l2`: of the output, against dense; `noise_l2`: of dense
against itself (-1: run once). `tomesd` are its defaults, which reach no level of SDXL that has attention;
`tomesd_deeper` has max_downsample=2.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import write_rows  # noqa: E402
from benchmarks.unet_model import SDXL, TINY, random_inputs, random_unet  # noqa: E402
from benchmarks.unet_sides import Cost, Side, all_sides  # noqa: E402

SIDES = ("agent", "kv_pool", "tomesd", "tomesd_deeper", "todo")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CELLS = ("side_ms", "speedup", "cost", "bound", "of_bound", "rel_l2")
LEAST = {"cpu": 1024, "cuda": 2048}  # tokens from which the library's methods work in a UNet


class AttentionClock(TorchFunctionMode):
    """Milliseconds of self-attention, by tokens, of what runs inside."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.calls = device, []  # type: ignore[var-annotated]

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is not F.scaled_dot_product_attention or args[0].shape[2] != args[1].shape[2]:
            return func(*args, **(kwargs or {}))
        out, milliseconds = clocked(lambda: func(*args, **(kwargs or {})), self.device)
        self.calls.append((args[0].shape[2], milliseconds))
        return out

    def by_tokens(self) -> dict[int, float]:
        found: dict[int, float] = defaultdict(float)
        for tokens, milliseconds in self.calls:
            found[tokens] += milliseconds()
        return dict(found)


def clocked(call: Callable[[], Any], device: str) -> tuple[Any, Callable[[], float]]:
    """What the call gives, and its milliseconds, which on a GPU must be asked for later: nothing waits inside."""
    if device == "cpu":
        start = time.perf_counter()
        found = call()
        took = 1e3 * (time.perf_counter() - start)
        return found, lambda: took
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    found = call()
    end.record()

    def wait() -> float:
        end.synchronize()
        return begin.elapsed_time(end)

    return found, wait


@dataclass(frozen=True)
class Run:
    """One forward: its output, its milliseconds; by tokens, what attention costs and, where clocked, what it took."""

    out: torch.Tensor
    took: float
    cost: Cost
    attention: dict[int, float]


class Bench:
    """One UNet at one size: its sides, run in turn."""

    def __init__(self, unet: Any, options: argparse.Namespace, pixels: int, say: Callable[[str], None]) -> None:
        self.unet, self.options, self.say, self.latents = unet, options, say, pixels // 8
        self.dense, *others = all_sides(self.latents, LEAST[options.device])
        self.sides = [self.dense, *(side for side in others if side.name in options.sides)]
        # A clock around each attention costs nothing beside a forward on a CPU. On a GPU it might: there it runs apart.
        self.clock_apart = options.device != "cpu"

    @property
    def forwards(self) -> int:
        return self.clock_apart + (1 + self.options.rounds) * len(self.sides)

    def forward(self, side: Side, pixels: int | None = None, clock: bool = False) -> Run:
        config, options = TINY if self.options.tiny else SDXL, self.options
        latents = self.latents if pixels is None else pixels // 8
        inputs = random_inputs(config, latents, 1 + options.cfg, DTYPES[options.dtype], options.device)
        attention = AttentionClock(options.device)
        with torch.no_grad(), side.apply(self.unet) as cost, attention if clock else nullcontext():
            out, took = clocked(lambda: self.unet(inputs.pop("sample"), **inputs).sample, options.device)
        run = Run(out, took(), cost, attention.by_tokens())
        self.say(f"{side.name} {side.setting}: {run.took:,.0f} ms")
        return run

    def rows(self) -> list[dict[str, object]]:
        """One for each side; the first is dense."""
        runs: dict[Side, list[Run]] = {}
        for side in self.sides:  # left out of all times: caches, allocators, tuning
            try:
                self.forward(side, self.options.warm_pixels)
                runs[side] = []
            except ImportError as error:
                self.say(f"{side.name}: {error}")
        apart = [self.forward(self.dense, clock=True)] if self.clock_apart else []
        for _ in range(self.options.rounds):
            for side, row in runs.items():
                row.append(self.forward(side, clock=side is self.dense and not apart))
        exact = [*apart, *runs[self.dense]]
        shares = {
            tokens: statistics.median(run.attention[tokens] / run.took for run in exact if run.attention)
            for tokens in exact[0].attention
        }
        noise = f"{relative(exact[-1].out, exact[0].out):.3g}" if len(exact) > 1 else -1
        dense_ms = median(runs[self.dense])
        return [
            self._about(side)
            | {"attention_share": round(sum(shares.values()), 3), "dense_ms": round(dense_ms, 1)}
            | (cells(runs[side], dense_ms, shares, exact[0].out) if side in runs else dict.fromkeys(CELLS, -1))
            | {"noise_l2": noise}
            for side in self.sides
        ]

    def _about(self, side: Side) -> dict[str, object]:
        import diffusers

        options = self.options
        name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
        return {
            "model": "tiny" if options.tiny else "sdxl", "pixels": 8 * self.latents, "batch": 1 + options.cfg,
            "dtype": options.dtype, "side": side.name, "setting": side.setting, "version": side.version,
            "rounds": options.rounds, "device": name, "diffusers": diffusers.__version__,
        }  # fmt: skip


def cells(runs: list[Run], dense_ms: float, shares: dict[int, float], exact: torch.Tensor) -> dict[str, object]:
    """What one side reached: CELLS."""
    share, gain = sum(shares.values()), dense_ms / median(runs)
    left = sum(part * runs[-1].cost(tokens) for tokens, part in shares.items())
    bound = 1 / (1 - share + left)
    found = (
        round(median(runs), 1), round(gain, 3), round(left / share, 4), round(bound, 3), round(gain / bound, 3),
        f"{relative(runs[-1].out, exact):.3g}",
    )  # fmt: skip
    return dict(zip(CELLS, found, strict=True))


def median(runs: list[Run]) -> float:
    return statistics.median(run.took for run in runs)


def relative(out: torch.Tensor, exact: torch.Tensor) -> float:
    return ((out.double() - exact.double()).norm() / exact.double().norm()).item()


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", nargs="*", type=int, default=[1024], help="sides of the square pictures")
    parser.add_argument("--device", default="cpu", choices=list(LEAST))
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--cfg", action="store_true", help="a batch of two, as with classifier-free guidance")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-pixels", type=int, help="the call that is left out is of this size instead")
    parser.add_argument("--tiny", action="store_true", help="a dry run: its times mean nothing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/unet.csv"))
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None, console: Console | None = None) -> None:
    options, console = arguments(given), console or Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("making the UNet", total=None)
        config = TINY if options.tiny else SDXL
        unet = random_unet(config, DTYPES[options.dtype], options.device)

        def measure(pixels: int) -> list[dict[str, object]]:
            def say(text: str) -> None:
                console.print(f"  {text}", highlight=False, markup=False)
                progress.advance(task)

            bench = Bench(unet, options, pixels, say)
            progress.reset(task, description=f"{pixels} x {pixels}", total=bench.forwards)
            return bench.rows()

        write_rows(options.pixels, measure, options.out)


if __name__ == "__main__":
    main()
