"""Which step of how many a forward is: from schedulers of both kinds, from a bare model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from attn_plugins.patches.steps import StepClock

diffusers = pytest.importorskip("diffusers")


class Root(torch.nn.Module):
    """A model whose forward has a timestep."""

    def forward(self, hidden_states: Any, timestep: Any) -> None: ...


class Pipe:
    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler


ROOT = Root()


def position(clock: StepClock, timestep: Any) -> tuple[int, int | None]:
    return clock.position(ROOT, (None, timestep), {})


def walk(pipe: Any, clock: StepClock, scheduler: Any, start: int = 0, calls: int = 1) -> list[tuple[int, int | None]]:
    """What the clock says in a denoising loop from step `start`; `calls` forwards a step, as CFG in two calls makes."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    sample, seen = torch.zeros(1, 4, 4, 4), []
    for t in scheduler.timesteps[start * scheduler.order :]:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, t)
        for _ in range(calls):
            seen.append(position(clock, t.expand(2)))
        scheduler.step(torch.zeros_like(sample), t, sample)
    return seen


SCHEDULERS = ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler",
              "DPMSolverMultistepScheduler", "CogVideoXDDIMScheduler", "DDPMScheduler"]  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_of_a_pipeline(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    pipe = Pipe(scheduler)
    clock = StepClock(pipe)
    for steps in (5, 5, 3):  # a second generation begins at 0 again
        scheduler.set_timesteps(steps)
        assert walk(pipe, clock, scheduler) == [(i, steps) for i in range(steps)]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_guidance_in_two_calls_is_one_step(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    pipe = Pipe(scheduler)
    clock = StepClock(pipe)
    scheduler.set_timesteps(4)
    assert walk(pipe, clock, scheduler, calls=2) == [(i, 4) for i in range(4) for _ in range(2)]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_image_to_image_starts_in_the_middle_of_the_whole(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    pipe = Pipe(scheduler)
    clock = StepClock(pipe)
    scheduler.set_timesteps(5)
    assert walk(pipe, clock, scheduler, start=2) == [(2, 5), (3, 5), (4, 5)]


def test_a_second_order_scheduler_counts_its_calls() -> None:
    scheduler = diffusers.HeunDiscreteScheduler()
    pipe = Pipe(scheduler)
    clock = StepClock(pipe)
    scheduler.set_timesteps(4)
    assert walk(pipe, clock, scheduler) == [(i, 7) for i in range(7)]


def test_the_scheduler_may_be_replaced_after_patching() -> None:
    pipe = Pipe(diffusers.DDIMScheduler())
    clock = StepClock(pipe)
    pipe.scheduler.set_timesteps(5)
    assert walk(pipe, clock, pipe.scheduler)[-1] == (4, 5)
    pipe.scheduler = diffusers.EulerDiscreteScheduler()
    pipe.scheduler.set_timesteps(3)
    assert walk(pipe, clock, pipe.scheduler) == [(0, 3), (1, 3), (2, 3)]


def test_two_pipelines_share_a_model() -> None:
    one, two = Pipe(diffusers.DDIMScheduler()), Pipe(diffusers.FlowMatchEulerDiscreteScheduler())
    clock = StepClock(one)
    clock.add(two)
    one.scheduler.set_timesteps(5)
    assert walk(one, clock, one.scheduler) == [(i, 5) for i in range(5)]
    two.scheduler.set_timesteps(4)
    assert walk(two, clock, two.scheduler) == [(i, 4) for i in range(4)]
    one.scheduler.set_timesteps(3)
    assert walk(one, clock, one.scheduler) == [(i, 3) for i in range(3)]


def test_a_pipeline_that_is_gone_leaves_its_scheduler() -> None:
    scheduler = diffusers.DDIMScheduler()
    pipe = Pipe(scheduler)
    clock = StepClock(pipe)
    scheduler.set_timesteps(5)
    walk(pipe, clock, scheduler)
    del pipe
    assert walk(None, clock, scheduler) == [(i, 5) for i in range(5)]


def test_the_address_of_the_timestep_is_enough() -> None:
    """A view of the scheduler's list needs no look at its value (on a GPU: no wait)."""
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(5)
    clock = StepClock(pipe := Pipe(scheduler))
    scheduler.timesteps[:] = 7  # values that tell nothing
    assert [position(clock, t.expand(3))[0] for t in scheduler.timesteps] == [0, 1, 2, 3, 4]
    assert pipe.scheduler is scheduler


def test_a_bare_model_counts_changes() -> None:
    clock = StepClock()
    seen = [position(clock, torch.tensor([t, t]))[0] for t in (999, 999, 700, 300, 300, 0, 999, 700)]
    assert seen == [0, 0, 1, 2, 2, 3, 0, 1]
    assert position(clock, 500) == (2, None)


def test_timesteps_per_token_count_by_the_largest() -> None:
    clock = StepClock()
    steps = [torch.tensor([[0, t, t]]) for t in (900, 900, 400)]
    assert [position(clock, t)[0] for t in steps] == [0, 0, 1]


def test_a_copied_pipeline_has_its_own_clock() -> None:
    pipe = Pipe(diffusers.DDIMScheduler())
    pipe.clock = StepClock(pipe)  # type: ignore[attr-defined]
    twin = copy.deepcopy(pipe)
    twin.scheduler.set_timesteps(3)
    pipe.scheduler.set_timesteps(5)
    assert position(twin.clock, twin.scheduler.timesteps[1]) == (1, 3)  # type: ignore[attr-defined]
    assert position(pipe.clock, pipe.scheduler.timesteps[1]) == (1, 5)  # type: ignore[attr-defined]
