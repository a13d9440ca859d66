"""Masks x lengths x directions x backends: check, time, and write one CSV file, with its table and its plot.

The Long-Context Attention Benchmark (arXiv 2510.17896) is the model: its masks, and ours beside them, by every backend
that is installed. A backend that cannot do a mask has a row with -1 and the reason.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from attn_plugins.pipelines import markdown
from attn_plugins.pipelines.benching import columns, environment, machine, plots, table
from attn_plugins.pipelines.benching.backends import flash_attention, registry, sdpa
from attn_plugins.pipelines.benching.contest import Budget, Contest, Outcome, contest
from attn_plugins.pipelines.benching.masks import MASKS, Mask, Shape, named
from attn_plugins.pipelines.benching.masks.mask import Told
from attn_plugins.pipelines.benching.results import Results, Row, read
from attn_plugins.pipelines.benching.sides import (
    BACKWARD,
    DTYPE_NAMES,
    FORWARD,
    TRAINING,
    Built,
    Cannot,
    Prepared,
    Setting,
    Side,
)  # fmt: skip
from attn_plugins.pipelines.comparing.measure_files import can_plot

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
QUICK = (1024, 2048)
Say = Callable[[str], None]


def quiet(text: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Args:
        masks, backends: names; () is all of them.
        lengths: tokens.
        dtypes: of "fp32", "bf16", "fp16".
        backward: also the backward alone, and both together.
        seconds: of timed rounds, for all backends of a mask together.
        rounds: least and most of them.
        tiny: a dry run: nothing is compiled, caches are not flushed, memory is not looked at; times mean nothing.

    Raises:
        ValueError: an unknown name, heads that are no multiple of the KV heads, or a number below 1.
    """

    masks: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    dtypes: tuple[str, ...] = ("fp32",)
    head_dims: tuple[int, ...] = (64,)
    heads: int = 4
    kv_heads: int = 4
    batch: int = 1
    backward: bool = False
    device: str = "cpu"
    seconds: float = 2.0
    rounds: tuple[int, int] = (5, 51)
    tiny: bool = False
    about: dict[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", tuple(named(self.masks)))
        object.__setattr__(self, "backends", tuple(registry.named(self.backends)))
        for name in self.dtypes:
            if name not in DTYPES:
                raise ValueError(f"dtype {name!r}: legal are {', '.join(DTYPES)}")
        for name in ("lengths", "head_dims"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give numbers from 1 on")
        if min(self.heads, self.kv_heads, self.batch) < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads over {self.kv_heads} KV heads: give a multiple of them")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {self.device!r}: PyTorch sees no GPU here; use cpu")

    @property
    def directions(self) -> tuple[tuple[bool, tuple[str, ...]], ...]:
        """(with gradients, the directions that are then measured)."""
        both = ((False, (FORWARD,)), (True, (BACKWARD, TRAINING)))
        return both if self.backward else both[:1]


@dataclass(frozen=True)
class Job:
    """A mask at one length, and on what."""

    mask: str
    shape: Shape
    setting: Setting

    def __str__(self) -> str:
        return f"{self.mask} {self.shape.tokens:,} {DTYPE_NAMES[self.setting.dtype]} D{self.setting.head_dim}"


def jobs(settings: BenchSettings) -> list[Job]:
    """What is measured, short sequences first, so that a run that is cut short has all masks."""
    device = torch.device(settings.device)
    return [
        Job(
            mask,
            Shape(tokens, settings.heads, settings.kv_heads, settings.batch),
            Setting(DTYPES[dtype], dim, device, settings.tiny),
        )
        for tokens in settings.lengths
        for dtype in settings.dtypes
        for dim in settings.head_dims
        for mask in settings.masks
    ]


def run(
    settings: BenchSettings,
    out: Path,
    resume: bool = False,
    minutes: float = 0.0,
    tick: Say = quiet,
    say: Say = quiet,
) -> Path:
    """Measure, and write the rows of each mask to `out` as they come, and the table beside it; returns its path.

    Args:
        out: the CSV file. Rows that it has of other measurements stay.
        resume: leave out what the file has of this machine and commit.
        minutes: begin nothing after so many; 0 is no limit.
        tick: is told each job when it is done, or left out.
        say: is told errors, wrong results, and what is left out for lack of time.

    Raises:
        ValueError: a name that does not end in .csv, or a file with other columns than today's.
    """
    if out.suffix != ".csv":
        raise ValueError(f"{out}: give a file that ends in .csv; table and plots go beside it, with other endings")
    results = Results(out, columns.COLUMNS, columns.KEY, keep=True)
    about = settings.about or describe(torch.device(settings.device))
    end = time.monotonic() + 60 * (minutes or 1e9)
    for job in jobs(settings):
        for gradients, directions in settings.directions:
            if resume and all(_is_there(results, job, settings, d, about) for d in directions):
                continue
            if time.monotonic() > end:
                say(f"left out for lack of time: {job} {' '.join(directions)}")
                continue
            results.add(*(row | about for row in measure(job, settings, gradients, say)))
        tick(str(job))
    return write_table(results.rows, out)


def write_table(rows: Sequence[Row], out: Path) -> Path:
    """The Markdown table of rows, beside the file `out`."""
    path = out.with_suffix(".md")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# Masked attention\n\n{table.markdown(rows)}", encoding="utf-8")
    return path


def draw(out: Path, page: Path | None = None) -> list[Path]:
    """Table and plots of a file, made from it alone; without matplotlib the table. Returns what was written.

    `page`: a Markdown page with markers of "bench" (markdown.fill), to put the tables between; the plots then go into
    its folder's `pictures`.

    Raises:
        ValueError: no such file, one with other columns than today's, or a page without these markers.
    """
    if not out.is_file():
        raise ValueError(f"{out}: no such file; measure first, with --out {out}")
    rows = read(out, columns.COLUMNS)
    stem = out.with_suffix("")
    if page is None:
        written = [write_table(rows, out)]
    else:
        written, stem = (
            [markdown.fill(page, "bench", table.markdown(rows, level=3))],
            page.parent / "pictures" / stem.name,
        )
    return [*written, *(plots.write(rows, stem) if can_plot() else [])]


def describe(device: torch.device) -> dict[str, str]:
    """On what it is measured, as columns."""
    found = environment.describe(device)
    gpu = found.pop("gpu")
    here = machine.describe()
    name = gpu if device.type == "cuda" else here["cpu"]
    return found | {"machine": name, "threads": here["threads"], "flash_attn": environment.version("flash-attn")}


def measure(job: Job, settings: BenchSettings, gradients: bool, say: Say = quiet) -> Iterator[Row]:
    """The rows of every backend, forward or (`gradients`) backward and both."""
    directions = dict(settings.directions)[gradients]
    setting = job.setting
    try:
        mask = MASKS[job.mask].make(job.shape)
        prepared = prepare(mask, settings.backends, setting)
    except Cannot as error:
        say(f"  {job}: {error}")
        yield from _refused(job, settings, directions, str(error))
        return
    budget = Budget(settings.seconds, *settings.rounds)
    held = contest(prepared, setting, budget, gradients, say, cold_caches=not setting.tiny)
    for one in held.outcomes:
        if one.side.role == "dense":
            continue
        for direction in held.directions:
            yield {"mask": job.mask, **columns.row(mask, setting, one, held, direction)}
    if "flex" in settings.backends:
        torch._dynamo.reset()  # the compiler has a limit of graphs; what it made stays on disk
    if setting.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def prepare(mask: Mask, backends: tuple[str, ...], setting: Setting) -> Prepared:
    """Inputs and sides: dense kernels for the baseline, and the backends."""
    leaves = mask.leaves(setting)
    dense = [*sdpa.KERNELS, *flash_attention.MODULES] if setting.device.type == "cuda" else ["sdpa_flash"]
    sides = [Side(f"dense {name}", "dense", _dense(name, mask, setting, leaves)) for name in dense]
    for name in backends:
        backend = registry.BACKENDS[name]
        sides.append(Side(name, backend.role, _built(backend, mask, setting, leaves), backend.lazy))
    generator = torch.Generator(setting.device).manual_seed(1)
    upstream = torch.randn(leaves[0].shape, generator=generator, device=setting.device, dtype=setting.dtype)
    return Prepared(leaves, upstream, mask.oracle(leaves), tuple(sides), mask.density)


def _dense(name: str, mask: Mask, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> Callable[[], Built]:
    def build() -> Built:
        if name in flash_attention.MODULES:
            return flash_attention.attend(name, Told(mask.causal), setting, leaves)
        return sdpa.forced(name, mask.causal, setting, leaves)

    return build


def _built(
    backend: registry.Backend, mask: Mask, setting: Setting, leaves: tuple[torch.Tensor, ...]
) -> Callable[[], Built]:
    return lambda: backend.build(mask, setting, leaves)


def _refused(job: Job, settings: BenchSettings, directions: tuple[str, ...], why: str) -> Iterator[Row]:
    """Rows of a mask that there is not at this length."""
    stand_in = MASKS["full"].make(job.shape)
    outcomes = [Outcome(Side(name, "peer", lambda: Built(lambda *t: t[0])), note=why) for name in settings.backends]
    held = Contest(outcomes, directions, (), {})
    for one in outcomes:
        for direction in directions:
            row = columns.row(stand_in, job.setting, one, held, direction)
            yield {"mask": job.mask, **row, "option": "-", "density": -1.0, "useful_gflop": -1.0}


def _is_there(results: Results, job: Job, settings: BenchSettings, direction: str, about: dict[str, str]) -> bool:
    """Whether the file has this job's rows, of this machine and commit."""
    for name in settings.backends:
        key = {
            "mask": job.mask, "tokens": job.shape.tokens, "batch": job.shape.batch, "heads": job.shape.heads,
            "kv_heads": job.shape.kv_heads, "head_dim": job.setting.head_dim,
            "dtype": DTYPE_NAMES[job.setting.dtype], "direction": direction, "backend": name, **about,
        }  # fmt: skip
        found = results.find(key)
        if found is None or found["commit"] != about["commit"]:
            return False
    return True


def quick(settings: BenchSettings) -> BenchSettings:
    """The same, of a few minutes: short sequences, half a second each."""
    return replace(settings, lengths=QUICK, seconds=min(settings.seconds, 0.5), rounds=(3, 51))
