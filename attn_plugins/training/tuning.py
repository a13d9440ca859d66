"""Tuning a video transformer by flow matching, and judging it on videos that are held out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from attn_plugins.training.flow_matching import flow_loss
from attn_plugins.training.loop import LoopSettings, train
from attn_plugins.training.video_batches import held_out_item, training_batch
from attn_plugins.training.video_data import VideoData


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneSettings(LoopSettings):
    """How to tune: as `LoopSettings`, and of flow matching: shift, of the noise levels, the scheduler's; drop_prompt:
    share of the prompts that are emptied.

    Raises:
        ValueError: a number that is not above zero.
    """

    shift: float = 3.0
    drop_prompt: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift <= 0:
            raise ValueError(f"shift={self.shift}: give a number above 0")


def tune(
    accelerator: Any, model: Any, data: VideoData, settings: TuneSettings, folder: Path, **options: Any
) -> list[float]:
    """Train what of `model` has gradients on, in place. `options`: as of `loop.train`, which this calls.

    Returns:
        The loss of every step, before that step, mean over processes.
    """

    def loss(wrapped: Any, step: int) -> torch.Tensor:
        batch = training_batch(
            data, step, settings.batch, seed=settings.seed, shift=settings.shift, drop_prompt=settings.drop_prompt,
            rank=accelerator.process_index, processes=accelerator.num_processes,
        ).to(accelerator.device)  # fmt: skip
        return flow_loss(wrapped, batch.latents, batch.prompts, batch.levels, batch.noise).mean()

    return train(accelerator, model, loss, settings, folder, **options)


@torch.no_grad()
def held_out_losses(accelerator: Any, model: Any, data: VideoData, settings: TuneSettings) -> list[float]:
    """The loss on each of the `held_out` videos, always the same and with the same noise; processes share the work."""
    count = settings.held_out
    losses = torch.zeros(count, device=accelerator.device)
    for number in range(accelerator.process_index, count, accelerator.num_processes):
        item = held_out_item(data, number, count, shift=settings.shift).to(accelerator.device)
        with accelerator.autocast():
            losses[number] = flow_loss(model, item.latents, item.prompts, item.levels, item.noise)[0]
    return accelerator.reduce(losses, "sum").tolist()
