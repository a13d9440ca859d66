"""Dense against patched on one model, same inputs: time, what bounds it, and what it did to the outputs.

Runs are interleaved (dense, each method, dense again) after a warm-up of all, so that a machine that slows down slows
all of them. The second dense run is the noise floor: what of the drift is not the method's.

Here are diffusers' pipelines; language models and image classifiers are in comparing/language.py and
comparing/classification.py, with the same rows, report and command.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from attn_plugins import record
from attn_plugins.metrics.perceptual import Perceptual, why_not
from attn_plugins.pipelines.comparing import progress as bars
from attn_plugins.pipelines.comparing import runs
from attn_plugins.pipelines.comparing.asked import Asked
from attn_plugins.pipelines.comparing.classification import compare_classifier
from attn_plugins.pipelines.comparing.clocks import Sites, clocked, machine
from attn_plugins.pipelines.comparing.comparison import Comparison
from attn_plugins.pipelines.comparing.lanes import Lane
from attn_plugins.pipelines.comparing.language import compare_language
from attn_plugins.pipelines.comparing.likeness import Tally
from attn_plugins.pipelines.comparing.runs import Run, as_frames
from attn_plugins.targets import find

__all__ = ["Comparison", "as_frames", "compare", "compare_classifier", "compare_language", "compare_pipeline"]
WARM_UP_STEPS = 2
TIMED_STEPS = 3


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
        pipe: a diffusers pipeline that is not patched, with a callback on its steps or a scheduler.
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
        ValueError: a pipeline that is patched already or whose steps cannot be told apart, no seeds, or an unusable
            call argument.
    """
    asked = [Asked(method=method, settings=dict(options or {}))]
    return compare_pipeline(
        pipe, asked, call_kwargs=call_kwargs, seeds=seeds, to_frames=to_frames, measure_rows=measure_rows,
        progress=progress,
    )[0]  # fmt: skip


def compare_pipeline(
    pipe: Any,
    asked: Sequence[Asked],
    *,
    call_kwargs: Mapping[str, Any] | None = None,
    prompts: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: Sequence[int] = (0,),
    to_frames: Callable[[Any], torch.Tensor] | None = None,
    measure_rows: int = 0,
    keep: int | None = None,
    progress: bool = False,
) -> list[Comparison]:
    """Several methods beside each other: one `Comparison` each, all against the same dense runs.

    Args:
        asked: the methods with their settings (comparing/asked.py reads them as they are typed).
        prompts: {name: arguments of the call that are this prompt's own}; every prompt runs with every seed. None:
            call_kwargs have all.
        keep: how many cases' pictures are kept for showing; None: all. Their scores are of all cases.
        other arguments, errors: as of `compare`; also an empty `asked`.
    """
    common = dict(call_kwargs or {})
    cases = [({**common, **own}, seed) for own in ({"": {}} if prompts is None else prompts).values() for seed in seeds]
    _check(pipe, [kwargs for kwargs, _ in cases], seeds, asked)
    if to_frames is None:
        for kwargs, _ in cases:
            if "output_type" in inspect.signature(type(pipe).__call__).parameters:
                kwargs.setdefault("output_type", "pt")
    device = torch.device(getattr(pipe, "_execution_device", None) or pipe.device)
    first, first_seed = cases[0]
    steps = runs.step_count(pipe, first)
    short = {**first, "num_inference_steps": min(TIMED_STEPS, steps)}
    warm_up = {**short, "num_inference_steps": min(WARM_UP_STEPS, steps)}
    missing = why_not()
    perceptual = None if missing else Perceptual()
    lanes = [Lane(one, Tally(perceptual)) for one in asked]
    dense, floor = Lane(Asked("dense"), Tally()), Lane(Asked("dense again"), Tally(perceptual))
    total = (len(lanes) + 1) * warm_up["num_inference_steps"] + (2 + len(lanes)) * len(cases) * steps
    total += len(lanes) * (bool(measure_rows) * steps + 2 * short["num_inference_steps"])

    with runs.quiet(pipe), bars.bar(progress, total) as tick:

        def call(kwargs: Mapping[str, Any], seed: int, name: str, lap: Callable[[], None] | None = None) -> Run:
            return runs.run(pipe, kwargs, seed, device, to_frames, lambda: tick(name), lap)

        call(warm_up, first_seed, "warm-up")
        for lane in lanes:
            with lane.asked.patched(pipe, dense_steps=0):
                call(warm_up, first_seed, "warm-up")
        for number, (kwargs, seed) in enumerate(cases):
            shown = keep is None or number < keep
            reference = call(kwargs, seed, "dense")
            for lane in lanes:
                with lane.asked.patched(pipe) as handle:
                    patched = call(kwargs, seed, lane.asked.label or "patched")
                    lane.note(handle)
                lane.tally.add(patched, reference)
                lane.keep(patched, shown)
            again = call(kwargs, seed, "dense again")
            floor.tally.add(again, reference)
            dense.keep(reference, shown)
            floor.keep(again, shown)
        clocks: dict[Sites, tuple[float, float]] = {}
        for lane in lanes:
            if measure_rows:
                with lane.asked.patched(pipe) as handle, handle.measure(measure_rows) as lane.measures:
                    call(first, first_seed, "measures")
            assert lane.sites is not None  # every lane has run
            if lane.sites not in clocks:
                with lane.sites.dense(pipe) as handle:
                    clocks[lane.sites] = clocked(lambda lap: call(short, first_seed, "attention", lap), handle)
            lane.dense_clock = clocks[lane.sites]
            with lane.asked.patched(pipe, dense_steps=0) as handle:
                lane.clock = clocked(lambda lap: call(short, first_seed, "attention", lap), handle)

    names, notes = tuple(prompts or ()), (missing,) if missing and floor.tally.scores[0].psnr is not None else ()
    return [_comparison(pipe, lane, dense, floor, tuple(seeds), names, notes, device) for lane in lanes]


def _comparison(
    pipe: Any, lane: Lane, dense: Lane, floor: Lane, seeds: tuple[int, ...], prompts: tuple[str, ...],
    notes: tuple[str, ...], device: torch.device,
) -> Comparison:  # fmt: skip
    likeness = lane.tally.likeness()
    steps = len(likeness.drift)
    sparse = lane.sparse_steps(steps)
    both = Lane(dense.asked, dense.tally, dense.runs + floor.runs, clock=lane.dense_clock)
    shown = [
        (reference, patched, again)
        for reference, patched, again in zip(dense.frames, lane.frames, floor.frames, strict=True)
        if reference is not None and patched is not None and again is not None
    ]
    return Comparison(
        model=type(pipe).__name__,
        method=lane.name,
        summary=lane.summary,
        seeds=seeds,
        steps=steps,
        dense_steps=steps - len(sparse),
        density=lane.density,
        dense=both.timing(range(steps)),
        patched=lane.timing(sparse),
        likeness=likeness,
        noise=floor.tally.likeness(),
        machine=machine(device),
        measures=lane.measures,
        frames=tuple((reference, patched) for reference, patched, _ in shown),
        again=tuple(again for *_, again in shown),
        prompts=prompts,
        notes=notes,
    )


def _check(pipe: Any, calls: Sequence[Mapping[str, Any]], seeds: Sequence[int], asked: Sequence[Asked]) -> None:
    parameters = inspect.signature(type(pipe).__call__).parameters
    if not runs.can_be_watched(pipe):
        raise ValueError(
            f"{type(pipe).__name__} takes no callback_on_step_end and has no scheduler: its steps cannot be told apart"
        )
    if not asked:
        raise ValueError("nothing to compare with dense attention: give one or more methods")
    if not seeds:
        raise ValueError("seeds is empty: give at least one")
    if not calls:
        raise ValueError("prompts is empty: give at least one")
    for kwargs in calls:
        for key in ("generator", runs.CALLBACK, "return_dict"):
            if key in kwargs:
                raise ValueError(f"call_kwargs has {key!r}, which compare sets itself (seeds=... for the generator)")
        unknown = [key for key in kwargs if key not in parameters]
        if unknown:
            raise ValueError(f"call_kwargs has {', '.join(unknown)}, which {type(pipe).__name__} does not take")
    if any(record.patches_of(target.root) for target in find(pipe)):
        raise ValueError(f"this {type(pipe).__name__} is patched already: attn_plugins.unpatch(pipe) first")
