"""Several tasks of one kind in turn: item by item, so that a batch has of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attn_plugins.training.tasks.task import Task


class MixedTask(Task):
    """Tasks on the same model; item n is of task n modulo their number. Batches are tensors, or tuples of some.

    Raises:
        ValueError: no tasks, or of different units.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        if not tasks or len({task.unit for task in tasks}) > 1:
            raise ValueError(f"{[task.unit for task in tasks]}: give one task or more, all judged by the same unit")
        self.tasks = list(tasks)
        self.unit = tasks[0].unit

    def load(self) -> Any:
        return self.tasks[0].load()

    def batch(self, numbers: range, seed: int) -> Any:
        items = [self._of(number).batch(self._own(number), seed) for number in numbers]
        if isinstance(items[0], torch.Tensor):
            return torch.cat(items)
        return tuple(torch.cat(parts) for parts in zip(*items, strict=True))

    def held_out(self, number: int) -> Any:
        return self._of(number).held_out(number // len(self.tasks))

    def losses(self, model: Any, batch: Any) -> torch.Tensor:
        return self.tasks[0].losses(model, batch)

    def inputs(self, batch: Any) -> Mapping[str, Any]:
        return self.tasks[0].inputs(batch)

    def moved(self, batch: Any, device: torch.device) -> Any:
        return self.tasks[0].moved(batch, device)

    def __repr__(self) -> str:
        return " and ".join(map(repr, self.tasks)) + ", in turn"

    def _of(self, number: int) -> Task:
        return self.tasks[number % len(self.tasks)]

    def _own(self, number: int) -> range:
        own = number // len(self.tasks)
        return range(own, own + 1)
