"""The batch of a step: a function of the seed and the step alone.

So a run that is resumed needs no state of its data, runs that are compared see the same videos and the same noise, and
two processes with a batch of 1 do what one does with a batch of 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attn_plugins.training.flow_matching import shifted
from attn_plugins.training.seeds import seeded
from attn_plugins.training.video_data import Item, VideoData


@dataclass(frozen=True)
class Batch:
    """latents, noise (B, C, T, H, W); prompts (B, L, D); levels (B,): what `flow_loss` takes."""

    latents: torch.Tensor
    prompts: torch.Tensor
    levels: torch.Tensor
    noise: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(part.to(device) for part in (self.latents, self.prompts, self.levels, self.noise)))


def training_batch(
    data: VideoData,
    step: int,
    size: int,
    *,
    seed: int = 0,
    shift: float = 1.0,
    drop_prompt: float = 0.0,
    rank: int = 0,
    processes: int = 1,
) -> Batch:
    """This process's share, `size` videos, of the batch of a step.

    shift: of the noise levels. drop_prompt: share of the prompts that are emptied, for classifier-free guidance.
    """
    whole = size * processes
    numbers = [step * whole + rank * size + place for place in range(size)]
    items = [data.item(number) for number in numbers]
    empty = data.empty()
    if empty is not None:
        drawn = [torch.rand((), generator=seeded(seed, "drop", number)).item() for number in numbers]
        items = [
            (video, empty if draw < drop_prompt else prompt) for (video, prompt), draw in zip(items, drawn, strict=True)
        ]
    # stratified: a small batch still covers the noise levels
    start = torch.rand((), generator=seeded(seed, "levels", step))
    shares = torch.tensor([number % whole / whole for number in numbers])
    return _batch(items, shifted((start + shares) % 1.0, shift), [(seed, "noise", number) for number in numbers])


def held_out_item(data: VideoData, number: int, count: int, *, shift: float = 1.0) -> Batch:
    """One of `count` held-out videos, each with its own noise level of an even ladder and always the same noise."""
    level = shifted(torch.tensor([(number + 0.5) / count]), shift)
    return _batch([data.held_out(number)], level, [("held out", number)])


def _batch(items: Sequence[Item], levels: torch.Tensor, keys: Sequence[tuple[object, ...]]) -> Batch:
    latents = torch.stack([video for video, _ in items])
    noise = torch.stack(
        [torch.randn(video.shape, generator=seeded(*key)) for (video, _), key in zip(items, keys, strict=True)]
    )
    return Batch(latents, torch.stack([prompt for _, prompt in items]), levels, noise)
