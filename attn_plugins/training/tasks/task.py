"""A task, and how any of them is trained and judged: jobs that compare models know no more of them than this."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from attn_plugins.training.loop import LoopSettings, train


def shown(unit: str, loss: float) -> float:
    """A mean loss as people read it: of the unit "perplexity" its exponential, of any other the loss."""
    return math.exp(loss) if unit == "perplexity" else loss


class Task(ABC):
    """Data, and what a model has to make of it.

    `unit`: of a model's loss as people read it: "perplexity" (its exponential), or the loss by name.
    """

    unit: str = "loss"

    @abstractmethod
    def load(self) -> Any:
        """The dense model, on the CPU, equal every time."""

    @abstractmethod
    def batch(self, numbers: range, seed: int) -> Any:
        """The training items of these numbers, of an endless row: equal for equal numbers and seeds."""

    @abstractmethod
    def held_out(self, number: int) -> Any:
        """A batch of one item that training never sees."""

    @abstractmethod
    def losses(self, model: Any, batch: Any) -> torch.Tensor:
        """(items,) float32, the mean loss of each. `model` may be wrapped."""

    @abstractmethod
    def inputs(self, batch: Any) -> Mapping[str, Any]:
        """Keyword arguments of the model's forward for a batch."""

    @abstractmethod
    def moved(self, batch: Any, device: torch.device) -> Any:
        """The batch on a device."""

    def __repr__(self) -> str:
        return type(self).__name__

    def shown(self, loss: float) -> float:
        """A mean loss, in `unit`."""
        return shown(self.unit, loss)


def train_task(
    accelerator: Any,
    model: Any,
    task: Task,
    settings: LoopSettings,
    folder: Path,
    *,
    run: Mapping[str, Any] | None = None,
    joined: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **options: Any,
) -> list[float]:
    """Train what of `model` has gradients on, in place.

    Args:
        joined: what is made of each loss before the backward: `RouterWatch.joined` adds a balance loss.
        run, options: as of `loop.train`.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes

    def loss(wrapped: Any, step: int) -> torch.Tensor:
        first = (step * processes + rank) * settings.batch
        batch = task.batch(range(first, first + settings.batch), settings.seed)
        found = task.losses(wrapped, task.moved(batch, accelerator.device)).mean()
        return found if joined is None else joined(found)

    return train(accelerator, model, loss, settings, folder, run={"task": repr(task), **(run or {})}, **options)


@torch.no_grad()
def held_out_losses(accelerator: Any, model: Any, task: Task, count: int) -> list[float]:
    """The loss on each of `count` held-out items, always the same ones; processes share the work."""
    losses = torch.zeros(count, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for number in range(accelerator.process_index, count, accelerator.num_processes):
        with accelerator.autocast():
            found = task.losses(model, task.moved(task.held_out(number), accelerator.device))
        losses[number] = found[0].double().cpu()
    model.train(was_training)
    return accelerator.reduce(losses.to(accelerator.device), "sum").tolist()
