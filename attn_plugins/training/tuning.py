"""The loop that tunes a video transformer by flow matching, on as many processes as accelerate has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from attn_plugins.training import checkpoints
from attn_plugins.training.flow_matching import flow_loss
from attn_plugins.training.trainable import trained
from attn_plugins.training.video_batches import held_out_item, training_batch
from attn_plugins.training.video_data import VideoData


@dataclasses.dataclass(frozen=True)
class TuneSettings:
    """How to tune.

    steps: of the optimizer. batch: videos a step and process. lr: peak of AdamW. warmup: steps to it; the second half
    of the run falls to zero in a straight line. shift: of the noise levels, the scheduler's. drop_prompt: share of the
    prompts that are emptied. clip: of the gradient's norm. save_every: steps between checkpoints. held_out: videos of
    the held-out loss. lora: rank, 0 for all weights. checkpointing: recompute activations.

    Raises:
        ValueError: a number that is not above zero.
    """

    steps: int = 200
    batch: int = 1
    lr: float = 2e-4
    warmup: int = 10
    shift: float = 3.0
    seed: int = 0
    drop_prompt: float = 0.1
    clip: float = 1.0
    save_every: int = 50
    held_out: int = 16
    lora: int = 0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "lr", "warmup", "shift", "clip", "save_every", "held_out"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a number above 0")

    def learning_rate(self, step: int) -> float:
        return self.lr * min(1.0, (step + 1) / self.warmup, 2 * (1 - step / self.steps))


def tune(
    accelerator: Any,
    model: Any,
    data: VideoData,
    settings: TuneSettings,
    folder: Path,
    *,
    run: Mapping[str, Any] | None = None,
    resume: bool = False,
    title: str = "tuning",
) -> list[float]:
    """Train what of `model` has gradients on, in place; checkpoints go to `folder`.

    Args:
        accelerator: an `accelerate.Accelerator`.
        run: what else makes this run (data, attention, ...): it may not differ in a run that is resumed.
        resume: take up the checkpoint in `folder`, if there is one; to the bit what it had been without a stop.
        title: of the progress bar.

    Returns:
        The loss of every step, before that step, mean over processes.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    identity = {**dataclasses.asdict(settings), "processes": accelerator.num_processes, **(run or {})}
    optimizer = torch.optim.AdamW(trained(model), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    with checkpoints.trained_only(accelerator):
        losses = checkpoints.load(accelerator, folder, identity) if resume else []
        bar = tqdm(total=settings.steps, initial=len(losses), desc=title, disable=not accelerator.is_main_process)
        for step in range(len(losses), settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate(step)
            loss = _loss(accelerator, wrapped, data, settings, step)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained(model), settings.clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            bar.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)
            bar.update()
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                checkpoints.save(accelerator, folder, identity, losses)
        bar.close()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # takes mixed precision off the model again
    accelerator.free_memory()
    return losses


def _loss(accelerator: Any, model: Any, data: VideoData, settings: TuneSettings, step: int) -> torch.Tensor:
    batch = training_batch(
        data, step, settings.batch, seed=settings.seed, shift=settings.shift, drop_prompt=settings.drop_prompt,
        rank=accelerator.process_index, processes=accelerator.num_processes,
    ).to(accelerator.device)  # fmt: skip
    return flow_loss(model, batch.latents, batch.prompts, batch.levels, batch.noise).mean()


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
