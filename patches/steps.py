"""Which step of how many a forward is.

From the pipeline's scheduler where there is one: its `step_index`, else where the timestep lies in its `timesteps`. A
bare model counts changes of the timestep. Nothing is hooked into a scheduler, so it may be replaced at any time.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from attn_plugins.patches.grids import argument

NAMES = ("timestep", "timesteps", "t", "timestep_ratio")  # what models call it


class _Count(threading.local):
    last: float | None = None
    step: int = 0


class StepClock:
    """The clock of one patched root; several pipelines may share that root.

    CFG in two calls is one step, and the two transformers of Wan 2.2 share one schedule, because a step is read from
    the scheduler, not counted in calls. A run that begins in mid-schedule (image to image) is there from its start.
    On a bare model a changed timestep is the next step, and one that goes back begins a new generation. Most models
    count down to the picture; where time `rises` towards it, back is the other way.
    """

    def __init__(self, pipe: object | None = None, rises: bool = False) -> None:
        self._rises = rises
        self._pipes: list[weakref.ref[Any]] = []
        self._schedulers: list[weakref.ref[Any]] = []
        self._count = _Count()
        if pipe is not None:
            self.add(pipe)

    def add(self, pipe: object) -> None:
        """Another pipeline runs this root."""
        if all(ref() is not pipe for ref in self._pipes):
            self._pipes = [ref for ref in self._pipes if ref() is not None] + [weakref.ref(pipe)]

    @property
    def pipes(self) -> list[Any]:
        """The pipelines that run this root, as far as they are known and alive."""
        return [pipe for pipe in (ref() for ref in self._pipes) if pipe is not None]

    def position(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int | None]:
        """(step from 0, length of the schedule or None). Reads a tensor's value only where no cheaper way tells."""
        given = (argument(root, args, kwargs, name) for name in NAMES)
        timestep = next((value for value in given if value is not None), None)
        found = [scheduler for scheduler in self._live_schedulers() if _length(scheduler)]
        if len(found) > 1:
            found = [s for s in found if _running(s, timestep)] or found[:1]
        for scheduler in found:
            step = _step_of(scheduler, timestep)
            if step is not None:
                return step, _length(scheduler)
        return self._counted(timestep), None

    def _live_schedulers(self) -> list[Any]:
        """The pipelines' schedulers as they are now; those last seen where the pipelines are gone."""
        now = [getattr(pipe, "scheduler", None) for pipe in self.pipes]
        if now:
            self._schedulers = [weakref.ref(scheduler) for scheduler in now if scheduler is not None]
        seen: list[Any] = []
        for ref in self._schedulers:
            scheduler = ref()
            if scheduler is not None and all(scheduler is not other for other in seen):
                seen.append(scheduler)
        return seen

    def _counted(self, timestep: Any) -> int:
        value, count = _value(timestep), self._count
        if value is None:
            return 0
        value = -value if self._rises else value
        if count.last is None or value > count.last:
            count.step = 0
        elif value < count.last:
            count.step += 1
        count.last = value
        return count.step

    def __deepcopy__(self, memo: dict[int, Any]) -> StepClock:
        copy = StepClock(rises=self._rises)
        copy._pipes = [weakref.ref(memo.get(id(pipe), pipe)) for ref in self._pipes if (pipe := ref()) is not None]
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {"rises": self._rises}  # a pickled model is a bare one: its pipelines are elsewhere

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(None, **state)  # type: ignore[misc]


def _length(scheduler: Any) -> int:
    timesteps = getattr(scheduler, "timesteps", None)
    return 0 if timesteps is None else len(timesteps)


def _step_of(scheduler: Any, timestep: Any) -> int | None:
    """The step that `scheduler` is at, or None where its state does not fit this call."""
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = _index_in(scheduler.timesteps, timestep)
    if index is None and hasattr(scheduler, "step_index"):
        index = getattr(scheduler, "begin_index", None) or 0  # no step has been taken since set_timesteps
    return None if index is None or not 0 <= int(index) < _length(scheduler) else int(index)


def _index_in(timesteps: Any, timestep: Any) -> int | None:
    """The position of `timestep` in a scheduler's list, or None.

    A pipeline passes `timesteps[i]`, often expanded over the batch, which is a view of the list: then its address
    tells, without waiting for the device.
    """
    if not isinstance(timesteps, torch.Tensor):
        timesteps = torch.as_tensor(timesteps)
    if isinstance(timestep, torch.Tensor) and timestep.dtype == timesteps.dtype and timestep.device == timesteps.device:
        offset, rest = divmod(timestep.data_ptr() - timesteps.data_ptr(), timesteps.element_size())
        if rest == 0 and 0 <= offset < len(timesteps):
            return offset
    value = _value(timestep)
    if value is None:
        return None
    matches = (timesteps.double() - value).abs() <= 1e-6 * max(1.0, abs(value))
    return int(matches.nonzero()[0]) if bool(matches.any()) else None


def _running(scheduler: Any, timestep: Any) -> bool:
    """Whether `timestep` is the one that `scheduler` is at (as given, or as the share of 1,000 that Flux gets)."""
    step, value = _step_of(scheduler, timestep), _value(timestep)
    if step is None or value is None:
        return False
    own = float(scheduler.timesteps[step])
    return any(abs(own - v) <= 1e-2 * max(1.0, abs(own)) for v in (value, value * 1000))


def _value(timestep: Any) -> float | None:
    """One number: the largest, where tokens have timesteps of their own (the first frame of Wan 2.2 TI2V is at 0)."""
    if isinstance(timestep, torch.Tensor):
        return float(timestep.max()) if timestep.numel() else None
    return None if timestep is None else float(timestep)
