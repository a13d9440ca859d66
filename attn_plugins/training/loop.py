"""The loop that trains a model by any loss, on as many processes as accelerate has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from attn_plugins.training import checkpoints
from attn_plugins.training.trainable import trained

Loss = Callable[[Any, int], torch.Tensor]  # (model, step) -> a scalar: this process' share of the step's batch
Optimizers = Callable[[Any, float], list[torch.optim.Optimizer]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How to train.

    steps: of the optimizer. batch: items a step and process. lr: peak of AdamW. warmup: steps to it; the second half
    of the run falls to zero in a straight line. seed: of the data and of a LoRA. clip: of the gradient's norm.
    save_every: steps between checkpoints. held_out: items that the model is judged on. lora: rank, 0 for all weights.
    checkpointing: recompute activations.

    Raises:
        ValueError: a number that is not above zero.
    """

    steps: int = 200
    batch: int = 1
    lr: float = 2e-4
    warmup: int = 10
    seed: int = 0
    clip: float = 1.0
    save_every: int = 50
    held_out: int = 16
    lora: int = 0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "lr", "warmup", "clip", "save_every", "held_out"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a number above 0")

    def learning_rate(self, step: int) -> float:
        return self.lr * min(1.0, (step + 1) / self.warmup, 2 * (1 - step / self.steps))


def adamw(model: Any, lr: float) -> list[torch.optim.Optimizer]:
    """What `train` takes unless it is told."""
    return [torch.optim.AdamW(trained(model), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)]


def train(
    accelerator: Any,
    model: Any,
    loss: Loss,
    settings: LoopSettings,
    folder: Path,
    *,
    run: Mapping[str, Any] | None = None,
    resume: bool = False,
    title: str = "training",
    optimizers: Optimizers = adamw,
) -> list[float]:
    """Train what of `model` has gradients on, in place; checkpoints go to `folder`.

    Args:
        accelerator: an `accelerate.Accelerator`.
        loss: of a step; it is given the model as accelerate wraps it.
        run: what else makes this run (data, attention, ...): it may not differ in a run that is resumed.
        resume: take up the checkpoint in `folder`, if there is one; to the bit what it had been without a stop.
        title: of the progress bar.
        optimizers: makes those of the model, of a learning rate; all follow the settings' schedule.

    Returns:
        The loss of every step, before that step, mean over processes.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    identity = {**dataclasses.asdict(settings), "processes": accelerator.num_processes, **(run or {})}
    wrapped, *used = accelerator.prepare(model, *optimizers(model, settings.lr))
    with checkpoints.trained_only(accelerator):
        losses = checkpoints.load(accelerator, folder, identity) if resume else []
        bar = tqdm(total=settings.steps, initial=len(losses), desc=title, disable=not accelerator.is_main_process)
        for step in range(len(losses), settings.steps):
            for group in (group for optimizer in used for group in optimizer.param_groups):
                group["lr"] = settings.learning_rate(step)
            found = loss(wrapped, step)
            accelerator.backward(found)
            accelerator.clip_grad_norm_(trained(model), settings.clip)
            for optimizer in used:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(found.detach(), "mean").item())
            bar.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)
            bar.update()
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                checkpoints.save(accelerator, folder, identity, losses)
        bar.close()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # takes mixed precision off the model again
    accelerator.free_memory()
    return losses
