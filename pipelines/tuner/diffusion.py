"""A diffusers pipeline as what is tuned: its cases are calls with a seed, its result the latents at the end."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attn_plugins.patching import patch
from attn_plugins.pipelines.comparing.runs import quiet
from attn_plugins.pipelines.stopwatch import Dense, now
from attn_plugins.pipelines.tuner.subject import (
    Probe,
    Ran,
    Subject,
    evenly,
    first_tensor,
    kept,
    places_of,
    relative_square,
)
from attn_plugins.targets import find


@dataclass(frozen=True)
class Call:
    """One call of the pipeline: keyword arguments, without a generator, and the seed of one."""

    kwargs: Mapping[str, Any]
    seed: int = 0
    label: str = field(default="", compare=False)


class DiffusionSubject(Subject):
    """Args: pipe: a pipeline that is not patched, whose call can return latents."""

    loss_name = "relative L2 of the final latents"
    has_steps = True

    def __init__(self, pipe: Any) -> None:
        self.obj = pipe
        self.targets = find(pipe)
        self.places = places_of(self.targets)
        self.device = torch.device(getattr(pipe, "_execution_device", "cpu"))
        self.grid = ()

    @torch.no_grad()
    def run(self, case: Call) -> Ran:
        generator = torch.Generator("cpu").manual_seed(case.seed)
        kwargs = {"output_type": "latent", "return_dict": False, **case.kwargs}
        with quiet(self.obj), self._counted() as count:
            start = now(self.device)
            result = first_tensor(self.obj(**kwargs, generator=generator))
            seconds = now(self.device) - start
        return Ran(result.detach(), seconds, count[0])

    def record(self, case: Call, count: int) -> tuple[Ran, list[Probe]]:
        total = self.run(case).forwards
        wanted = set(evenly(count, total))
        probes: list[Probe] = []
        number = [0]

        given: list[Any] = []

        def before(root: Any, args: Any, kwargs: Any) -> None:
            given[:] = [kept(args), kept(kwargs)] if number[0] in wanted else []

        def after(root: Any, args: Any, output: Any) -> None:
            if number[0] in wanted:
                at = (number[0] + 0.5) / total
                probes.append(Probe(root, given[0], given[1], at, first_tensor(output).detach().clone()))
            number[0] += 1

        roots = [target.root for target in self.targets]
        hooks = [root.register_forward_pre_hook(before, with_kwargs=True) for root in roots]
        hooks += [root.register_forward_hook(after) for root in roots]
        try:
            # a patch that stays dense reads the grid: nothing else knows how
            with patch(self.obj, Dense(), min_tokens=0) as handle:
                ran = self.run(case)
                sequences = [patched.state.last_sequence for patched in handle.patches]
        finally:
            for hook in hooks:
                hook.remove()
        known = [sequence.grid for sequence in sequences if sequence is not None]
        self.grid = tuple(max(known, key=math.prod, default=()))
        steps = getattr(self.obj, "num_timesteps", None)
        self.steps = steps if isinstance(steps, int) and steps > 0 else None
        return ran, probes

    def loss(self, result: torch.Tensor, dense: torch.Tensor) -> float:
        return math.sqrt(relative_square(result, dense))

    def error(self, output: torch.Tensor, dense: torch.Tensor) -> float:
        return relative_square(output, dense)

    def size(self, loss: float) -> float:
        return loss * loss

    def root(self, error: float) -> float:
        return math.sqrt(max(error, 0.0))

    @contextlib.contextmanager
    def _counted(self) -> Iterator[list[int]]:
        count = [0]

        def add(*_: Any) -> None:
            count[0] += 1

        hooks = [target.root.register_forward_pre_hook(add) for target in self.targets]
        try:
            yield count
        finally:
            for hook in hooks:
                hook.remove()
