"""Telling the noise in pictures of a class, for diffusers' DiT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from attn_plugins.training.pictures import Item, PictureData
from attn_plugins.training.seeds import seeded
from attn_plugins.training.tasks.classes import APART
from attn_plugins.training.tasks.task import Task

STEPS, FIRST, LAST = 1000, 1e-4, 0.02  # DiT's noise schedule: linear betas
LEVELS = 8  # held-out items take these noise levels in turn
Encode = Callable[[torch.Tensor], torch.Tensor]


class Noised(NamedTuple):
    """latents and noise (B, C, S, S), timesteps (B,) int64, labels (B,)."""

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    labels: torch.Tensor


class DenoisingTask(Task):
    """The mean squared error of the noise that a DiT tells, at every level of noise.

    Args:
        load: gives a `DiTTransformer2DModel`.
        data: pictures, whose labels are the model's classes.
        encode: pixels (1, 3, P, P) to latents (1, C, S, S); None: the pictures themselves, scaled to the latents' size,
            their channels repeated.
    """

    unit = "squared error"

    def __init__(self, load: Callable[[], Any], data: PictureData, encode: Encode | None = None) -> None:
        self.load_model, self.data, self.encode = load, data, encode
        config = load().config
        self.channels, self.side = config.in_channels, config.sample_size
        betas = torch.linspace(FIRST, LAST, STEPS, dtype=torch.float64)
        self.kept = (1 - betas).cumprod(0).float()

    def load(self) -> Any:
        return self.load_model()

    def batch(self, numbers: range, seed: int) -> Noised:
        rows = []
        for number in numbers:
            draw = seeded(seed, "noise", number)
            timestep = int(torch.randint(STEPS, (), generator=draw))
            rows.append(self._noised(self.data.item(seed * APART + number), timestep, draw))
        return _joined(rows)

    def held_out(self, number: int) -> Noised:
        timestep = (2 * (number % LEVELS) + 1) * STEPS // (2 * LEVELS)
        return _joined([self._noised(self.data.held_out(number), timestep, seeded("held out noise", number))])

    def _noised(self, item: Item, timestep: int, draw: torch.Generator) -> Noised:
        pixels, label = item
        if self.encode is not None:
            latents = self.encode(pixels[None])[0]
        else:
            small = F.interpolate(pixels[None], size=(self.side, self.side), mode="area")[0]
            latents = small[torch.arange(self.channels) % small.shape[0]]
        noise = torch.randn(latents.shape, generator=draw)
        return Noised(latents, noise, torch.tensor(timestep), torch.tensor(label))

    def losses(self, model: Any, batch: Noised) -> torch.Tensor:
        found = model(**self.inputs(batch)).sample[:, : self.channels]  # a second half tells variances
        return F.mse_loss(found.float(), batch.noise, reduction="none").flatten(1).mean(1)

    def inputs(self, batch: Noised) -> Mapping[str, Any]:
        kept = self.kept.to(batch.timesteps.device)[batch.timesteps].view(-1, 1, 1, 1)
        noised = kept.sqrt() * batch.latents + (1 - kept).sqrt() * batch.noise
        return {"hidden_states": noised, "timestep": batch.timesteps, "class_labels": batch.labels}

    def moved(self, batch: Noised, device: torch.device) -> Noised:
        return Noised(*(t.to(device) for t in batch))

    def __repr__(self) -> str:
        return f"{self.data!r}, noised"


def vae_encoder(vae: Any) -> Encode:
    """Of a diffusers AutoencoderKL: the means of its latents, scaled as its model is trained on them."""

    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        found = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean * vae.config.scaling_factor
        return found.float().cpu()

    return encode


def _joined(rows: list[Noised]) -> Noised:
    return Noised(*(torch.stack(parts) for parts in zip(*rows, strict=True)))
