"""One call of a diffusers pipeline, looked at: latents after each step, its clock, and the pictures that came out."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attn_plugins.pipelines.stopwatch import now

CALLBACK = "callback_on_step_end"
ToFrames = Callable[[Any], torch.Tensor]
AfterStep = Callable[[torch.Tensor], None]


@dataclass
class Run:
    """One call of the pipeline: latents after each step, seconds of each step but the first, and of the whole call."""

    latents: list[torch.Tensor]
    seconds: list[float]
    job: float
    frames: torch.Tensor | None


def run(
    pipe: Any, kwargs: Mapping[str, Any], seed: int, device: torch.device, to_frames: ToFrames | None,
    tick: Callable[[], None], lap: Callable[[], None] | None = None,
) -> Run:  # fmt: skip
    """Call the pipeline once.

    Args:
        tick: called after each step, when its clock stands still; lap: before that.
    """
    latents: list[torch.Tensor] = []
    moments: list[float] = []

    def after_step(sample: torch.Tensor) -> None:
        moments.append(now(device))
        latents.append(sample.detach().to("cpu", copy=True))
        if lap is not None:
            lap()
        tick()
        moments.append(now(device))

    start = now(device)
    with torch.no_grad(), _watched(pipe, after_step) as watching:
        generator = torch.Generator("cpu").manual_seed(seed)
        output = pipe(**kwargs, **watching, generator=generator, return_dict=False)[0]
    job = now(device) - start
    # moments are pairs (step done, callback done): a step lasts from the end of one callback to the start of the next
    done, resumed = moments[0::2], moments[1::2]
    job -= sum(after - before for before, after in zip(done, resumed, strict=True))
    seconds = [end - begin for begin, end in zip(resumed[:-1], done[1:], strict=True)]
    if not latents:
        raise ValueError(f"{type(pipe).__name__} made no steps: there is nothing to compare")
    if to_frames is not None:
        frames = as_frames(to_frames(output))
    else:
        frames = None if kwargs.get("output_type") == "latent" else as_frames(output)
    return Run(latents, seconds or [job], job, frames)


def step_count(pipe: Any, kwargs: Mapping[str, Any]) -> int:
    """How many denoising steps a call is asked for."""
    default = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    return int(kwargs.get("num_inference_steps", default))


def can_be_watched(pipe: Any) -> bool:
    """Whether its steps can be told apart, by a callback of the pipeline's or by its scheduler."""
    takes = inspect.signature(type(pipe).__call__).parameters
    by_scheduler = callable(getattr(getattr(pipe, "scheduler", None), "step", None))
    return "num_inference_steps" in takes and (CALLBACK in takes or by_scheduler)


@contextlib.contextmanager
def _watched(pipe: Any, after_step: AfterStep) -> Iterator[dict[str, Any]]:
    """Arguments of the call that bring `after_step` the latents; of a pipeline without a callback, its scheduler does.

    What the scheduler's `step` gives stands in for it on this one instance, inside the block only.
    """
    if CALLBACK in inspect.signature(type(pipe).__call__).parameters:

        def callback(_pipe: Any, _step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
            after_step(state["latents"])
            return {}

        yield {CALLBACK: callback}
        return
    scheduler = pipe.scheduler
    original = scheduler.step

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        after_step(out[0])
        return out

    scheduler.step = step
    try:
        yield {}
    finally:
        del scheduler.step


@contextlib.contextmanager
def quiet(pipe: Any) -> Iterator[None]:
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


def as_frames(output: Any) -> torch.Tensor | None:
    """(B, F, C, H, W) float in 0..1 on the CPU, or None where the output is no pictures.

    output: grey uint8 videos (B, F, H, W), float pictures (B, C, H, W) or videos (B, F, C, H, W); of pipelines that
    know no tensors, NumPy pictures and videos with channels last, or a list of PIL's.
    """
    if isinstance(output, list) and output and all(hasattr(one, "getbands") for one in output):
        pixels = [torch.from_numpy(np.array(one.convert("RGB"))) for one in output]
        return torch.stack(pixels).movedim(-1, 1)[:, None].float().div(255)
    if isinstance(output, np.ndarray) and output.ndim in (4, 5) and output.dtype.kind == "f":
        output = torch.from_numpy(output).movedim(-1, -3)
    if not isinstance(output, torch.Tensor):
        return None
    if output.dtype == torch.uint8:
        frames = output.float().div(255).cpu()
        return frames[:, :, None] if frames.ndim == 4 else frames
    frames = output.detach().float().cpu().clamp(0, 1)
    if frames.ndim == 4:
        return frames[:, None]
    return frames if frames.ndim == 5 else None
