"""What MIP's training draws for each picture (arXiv 2409.17920): what is dropped, how much noise, what is to be told.

All of it depends on the picture's number and the seed alone, so that a run that is resumed draws the same, and so do
two processes with half a batch each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins.training.seeds import seeded
from attn_plugins.training.two_objects import ObjectData, TwoObjects

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Drops:
    """Shares of the pictures that are trained without their references, without their prompt, without both.

    Raises:
        ValueError: a share below 0, or more than 1 in all.
    """

    image: float = 0.05
    text: float = 0.05
    both: float = 0.05

    def __post_init__(self) -> None:
        shares = (self.image, self.text, self.both)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"drops {shares}: give three shares of 0 or more, 1 in all at most")

    def of(self, numbers: Sequence[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(without references, without prompt), both (B,) bool."""
        drawn = torch.tensor([torch.rand((), generator=seeded(seed, "drop", number)).item() for number in numbers])
        both = drawn < self.both
        image = drawn < self.both + self.image
        text = both | ((drawn >= self.both + self.image) & (drawn < self.both + self.image + self.text))
        return image, text


@dataclass
class ObjectBatch:
    """Pictures of a step, by number; times (B,) int64 and noise are drawn for the latents of shape (B, C, h, w)."""

    numbers: list[int]
    items: list[TwoObjects]
    levels: torch.Tensor  # (B,) in 0..1, share of the schedule's steps
    key: str
    seed: int = 0

    def noise(self, shape: Sequence[int]) -> torch.Tensor:
        """Of the latents (B, C, h, w)."""
        rows = [torch.randn(tuple(shape[1:]), generator=seeded(self.seed, self.key, number)) for number in self.numbers]
        return torch.stack(rows)

    def times(self, steps: int) -> torch.Tensor:
        """Of a schedule of so many steps, (B,)."""
        return (self.levels * steps).long().clamp(0, steps - 1)


def training_batch(
    data: ObjectData, step: int, size: int, *, seed: int = 0, rank: int = 0, processes: int = 1
) -> ObjectBatch:
    """This process's share, `size` pictures, of a step's batch; noise levels are even over the whole batch."""
    whole = size * processes
    numbers = [step * whole + rank * size + place for place in range(size)]
    start = torch.rand((), generator=seeded(seed, "levels", step))
    shares = torch.tensor([number % whole / whole for number in numbers])
    return ObjectBatch(numbers, [data.item(number) for number in numbers], (start + shares) % 1.0, "noise", seed)


def held_out_batch(data: ObjectData, numbers: Sequence[int], count: int) -> ObjectBatch:
    """Held-out pictures, each at its own place of an even ladder of `count` levels, always with the same noise."""
    levels = torch.tensor([(number * 7 % count + 0.5) / count for number in numbers])  # 7: neighbours differ
    return ObjectBatch(list(numbers), [data.held_out(number) for number in numbers], levels, "held out noise")


def denoising_target(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """What the model is to predict: the noise, as in the paper, or what else its scheduler says.

    Raises:
        ValueError: a kind of prediction that is not known.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, times)
    if kind == "sample":
        return latents
    raise ValueError(f"the scheduler predicts {kind!r}: known are {', '.join(PREDICTIONS)}")
