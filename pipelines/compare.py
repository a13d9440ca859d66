"""Dense against patched on one pipeline, same seeds: time, what bounds it, and what it did to the picture.

Runs are interleaved (dense, patched, dense again) after a warm-up of both, so that a machine that slows down slows all
of them. The second dense run is the noise floor: what of the drift is not the method's.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins import record
from attn_plugins.handle import PatchHandle
from attn_plugins.metrics import Drift, bit_identical, drift, latent_psnr, psnr, ssim
from attn_plugins.metrics.ssim import WINDOW
from attn_plugins.patching import patch
from attn_plugins.pipelines.comparing.comparison import Comparison, Likeness, Timing, mean_drift
from attn_plugins.pipelines.stopwatch import Dense, Stopwatch, attach, now
from attn_plugins.report import analyse
from attn_plugins.targets import find

WARM_UP_STEPS = 2
TIMED_STEPS = 3
Tick = Callable[[str], None]


@dataclass
class Run:
    """One call of the pipeline: latents after each step, seconds of each step but the first, and of the whole call."""

    latents: list[torch.Tensor]
    seconds: list[float]
    job: float
    frames: torch.Tensor | None


def compare(
    pipe: Any,
    method: Any = None,
    *,
    call_kwargs: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    options: Mapping[str, Any] | None = None,
    to_frames: Callable[[Any], torch.Tensor] | None = None,
    measure_rows: int = 0,
    progress: bool = False,
) -> Comparison:
    """Run `pipe` dense and patched, and say what changed. The pipeline is left as it was.

    Args:
        pipe: a diffusers pipeline that is not patched and whose call takes `callback_on_step_end`.
        method: as for `patch`; None is what the presets recommend.
        call_kwargs: arguments of the pipeline's call (prompt, sizes, num_inference_steps, ...), without a generator.
        seeds: one dense, one patched and one more dense run each.
        options: keyword arguments of `patch` (quality, dense_steps, window, ...).
        to_frames: makes frames (B, F, H, W) uint8 or (B, F, C, H, W) float in 0..1 of the pipeline's output. None: the
            pipeline is asked for tensors; where call_kwargs ask for latents there are no pictures.
        measure_rows: query rows of each head that are compared with dense attention, in one more patched run of the
            first seed, for recall and relative L1 by layer and step (64 to 256 are usual); 0: no such run.
        progress: show a bar.

    Raises:
        ValueError: a pipeline that is patched already or takes no callback, no seeds, or an unusable call argument.
    """
    kwargs = dict(call_kwargs or {})
    _check(pipe, kwargs, seeds)
    kwargs.setdefault("output_type", "pt")
    options = dict(options or {})
    device = torch.device(getattr(pipe, "_execution_device", "cpu"))
    short = {**kwargs, "num_inference_steps": min(TIMED_STEPS, _steps(pipe, kwargs))}
    warm_up = {**short, "num_inference_steps": min(WARM_UP_STEPS, short["num_inference_steps"])}
    always = {**options, "dense_steps": 0}

    runs: dict[str, list[Run]] = {"dense": [], "patched": [], "again": []}
    with _quiet(pipe), _ticker(progress, 3 * len(seeds) + bool(measure_rows), kwargs, pipe) as tick:

        def dense_run(seed: int, arguments: Mapping[str, Any], name: str) -> Run:
            return _run(pipe, arguments, seed, device, to_frames, lambda: tick(name))

        dense_run(seeds[0], warm_up, "warm-up")
        with _patched(pipe, method, always):
            dense_run(seeds[0], warm_up, "warm-up")
        for seed in seeds:
            runs["dense"].append(dense_run(seed, kwargs, "dense"))
            with _patched(pipe, method, options) as handle:
                runs["patched"].append(dense_run(seed, kwargs, "patched"))
                report, summary = analyse(handle), handle.summary()
                names = frozenset(layer.name for patched in handle.patches for layer in patched.layers)
                state, method_name = handle.patches[0].state, handle.method
            runs["again"].append(dense_run(seed, kwargs, "dense again"))
        same_sites = {"dense_steps": 0, "min_tokens": state.min_tokens, "layers": lambda site: site.name in names}
        measures = None
        if measure_rows:
            with _patched(pipe, method, options) as handle, handle.measure(measure_rows) as measures:
                dense_run(seeds[0], kwargs, "measures")
        clocks = {}
        for name, what, settings in (("dense", Dense(), same_sites), ("patched", method, always)):
            with _patched(pipe, what, settings) as handle:
                clocks[name] = _clocked(pipe, handle, short, seeds[0], device, to_frames, lambda: tick("attention"))

    steps = len(runs["dense"][0].latents)
    sparse = state.schedule.sparse_steps(steps)
    saved = [row.saved for row in report]
    density = None if any(value is None for value in saved) else 1 - statistics.mean(value or 0.0 for value in saved)
    dense_runs = runs["dense"] + runs["again"]
    return Comparison(
        model=type(pipe).__name__,
        method=method_name,
        summary=summary,
        seeds=tuple(seeds),
        steps=steps,
        dense_steps=steps - len(sparse),
        density=density,
        dense=Timing(
            _median_step(dense_runs, range(steps)), statistics.median(run.job for run in dense_runs), *clocks["dense"]
        ),
        patched=Timing(
            _median_step(runs["patched"], sparse),
            statistics.median(run.job for run in runs["patched"]),
            *clocks["patched"],
        ),
        likeness=_likeness(runs["patched"], runs["dense"]),
        noise=_likeness(runs["again"], runs["dense"]),
        machine=_machine(device),
        measures=measures,
        frames=tuple(
            (dense.frames, patched.frames)
            for dense, patched in zip(runs["dense"], runs["patched"], strict=True)
            if dense.frames is not None and patched.frames is not None
        ),
    )


def as_frames(output: Any) -> torch.Tensor | None:
    """(B, F, C, H, W) float in 0..1 on the CPU, of grey uint8 videos (B, F, H, W), or of float pictures or videos."""
    if not isinstance(output, torch.Tensor):
        return None
    if output.dtype == torch.uint8:
        frames = output.float().div(255).cpu()
        return frames[:, :, None] if frames.ndim == 4 else frames
    frames = output.detach().float().cpu().clamp(0, 1)
    if frames.ndim == 4:
        return frames[:, None]
    return frames if frames.ndim == 5 else None


def _check(pipe: Any, kwargs: Mapping[str, Any], seeds: Sequence[int]) -> None:
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "callback_on_step_end" not in parameters:
        raise ValueError(f"{type(pipe).__name__} takes no callback_on_step_end: its steps cannot be told apart")
    for key in ("generator", "callback_on_step_end", "return_dict"):
        if key in kwargs:
            raise ValueError(f"call_kwargs has {key!r}, which compare sets itself (seeds=... for the generator)")
    unknown = [key for key in kwargs if key not in parameters]
    if unknown:
        raise ValueError(f"call_kwargs has {', '.join(unknown)}, which {type(pipe).__name__} does not take")
    if not seeds:
        raise ValueError("seeds is empty: give at least one")
    if any(record.patches_of(target.root) for target in find(pipe)):
        raise ValueError(f"this {type(pipe).__name__} is patched already: attn_plugins.unpatch(pipe) first")


def _steps(pipe: Any, kwargs: Mapping[str, Any]) -> int:
    default = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    return int(kwargs.get("num_inference_steps", default))


@contextlib.contextmanager
def _patched(pipe: Any, method: Any, options: Mapping[str, Any]) -> Iterator[PatchHandle]:
    handle = patch(pipe, method, **options)
    try:
        yield handle
    finally:
        handle.remove()


def _run(
    pipe: Any, kwargs: Mapping[str, Any], seed: int, device: torch.device,
    to_frames: Callable[[Any], torch.Tensor] | None, tick: Callable[[], None], lap: Callable[[], None] | None = None,
) -> Run:  # fmt: skip
    latents: list[torch.Tensor] = []
    moments: list[float] = []

    def after_step(_pipe: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        moments.append(now(device))
        latents.append(state["latents"].detach().to("cpu", copy=True))
        if lap is not None:
            lap()
        tick()
        moments.append(now(device))
        return {}

    start = now(device)
    with torch.no_grad():
        generator = torch.Generator("cpu").manual_seed(seed)
        output = pipe(**kwargs, generator=generator, callback_on_step_end=after_step, return_dict=False)[0]
    job = now(device) - start
    # moments are pairs (step done, callback done): a step lasts from the end of one callback to the start of the next
    done, resumed = moments[0::2], moments[1::2]
    job -= sum(after - before for before, after in zip(done, resumed, strict=True))
    seconds = [end - begin for begin, end in zip(resumed[:-1], done[1:], strict=True)]
    if to_frames is not None:
        frames = as_frames(to_frames(output))
    else:
        frames = None if kwargs.get("output_type") == "latent" else as_frames(output)
    return Run(latents, seconds or [job], job, frames)


def _clocked(
    pipe: Any, handle: PatchHandle, kwargs: Mapping[str, Any], seed: int, device: torch.device,
    to_frames: Callable[[Any], torch.Tensor] | None, tick: Callable[[], None],
) -> tuple[float, float]:  # fmt: skip
    """(attention per step, step), medians in seconds, over the steps after the first."""
    watch, laps = Stopwatch(), []
    attach(watch, handle)
    run = _run(pipe, kwargs, seed, device, to_frames, tick, lambda: laps.append(watch.lap()))
    return statistics.median(laps[1:] or laps), statistics.median(run.seconds)


def _median_step(runs: list[Run], steps: range) -> float:
    """Over some steps; the seconds of the very first step are not known (the prompt is in them)."""
    known = slice(max(steps.start - 1, 0), max(steps.stop - 1, 0))
    seconds = [second for run in runs for second in (run.seconds[known] or run.seconds[-1:])]
    return statistics.median(seconds)


def _likeness(runs: list[Run], reference: list[Run]) -> Likeness:
    drifts: list[list[Drift]] = []
    latents, identical = [], []
    peaks, similarities = [], []
    for run, dense in zip(runs, reference, strict=True):
        pairs = list(zip(run.latents, dense.latents, strict=True))
        drifts.append([drift(a, b) for a, b in pairs])
        latents.append([latent_psnr(a, b) for a, b in pairs])
        identical.append([bit_identical(a, b) for a, b in pairs])
        if run.frames is not None and dense.frames is not None:
            peaks.append(float(psnr(run.frames, dense.frames).mean()))
            if min(run.frames.shape[-2:]) >= WINDOW:
                similarities.append(float(ssim(run.frames, dense.frames).mean()))
    return Likeness(
        mean_drift(drifts),
        tuple(_finite_mean(step) for step in zip(*latents, strict=True)),
        tuple(all(step) for step in zip(*identical, strict=True)),
        statistics.fmean(peaks) if peaks else None,
        statistics.fmean(similarities) if similarities else None,
    )


def _finite_mean(decibels: Sequence[float]) -> float:
    """Of those that differ from dense; infinite where none does."""
    return statistics.fmean([value for value in decibels if not math.isinf(value)] or [math.inf])


@contextlib.contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """The pipeline's own bar off, and as it was afterwards."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before


@contextlib.contextmanager
def _ticker(progress: bool, runs: int, kwargs: Mapping[str, Any], pipe: Any) -> Iterator[Tick]:
    if not progress:
        yield lambda name: None
        return
    from rich.progress import Progress

    steps = _steps(pipe, kwargs)
    total = 2 * min(WARM_UP_STEPS, steps) + runs * steps + 2 * min(TIMED_STEPS, steps)
    with Progress(transient=True) as bar:
        task = bar.add_task("compare", total=total)
        yield lambda name: bar.update(task, advance=1, description=name)


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
