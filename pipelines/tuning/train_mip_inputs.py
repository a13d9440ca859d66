"""What a UNet with an IP-Adapter is given in training, made by its pipeline: latents, prompts, references, phrases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from attn_plugins.patches.phrases import encode
from attn_plugins.training.mip import Drops, ObjectBatch, denoising_target
from attn_plugins.training.two_objects import TwoObjects

NONE = Drops(0.0, 0.0, 0.0)


class AdapterInputs:
    """Of a pipeline of Stable Diffusion 1.5 or XL with one IP-Adapter. Nothing here has a gradient.

    Raises:
        ValueError: a pipeline without an IP-Adapter, or without the models that read prompts and references.
    """

    def __init__(self, pipe: Any) -> None:
        layers: Any = getattr(getattr(pipe.unet, "encoder_hid_proj", None), "image_projection_layers", [])
        if len(layers) != 1:
            raise ValueError(f"the pipeline has {len(layers)} IP-Adapters: load the one that is to be trained")
        if getattr(pipe, "image_encoder", None) is None or getattr(pipe, "feature_extractor", None) is None:
            raise ValueError("the pipeline has no image encoder: load_ip_adapter(...) with its image_encoder_folder")
        self.pipe, self.device = pipe, pipe.unet.device
        self.hidden_states = type(layers[0]).__name__ != "ImageProjection"  # what adapters but the base one read
        self.wide = pipe.unet.config.addition_embed_type == "text_time"
        self.known: dict[str, tuple[torch.Tensor, int]] = {}

    @torch.no_grad()
    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) in float32, of pictures (B, 3, H, W) in -1..1; without an autoencoder the pictures' own px."""
        vae = getattr(self.pipe, "vae", None)
        if vae is None:
            cell = round((self.pipe.unet.config.in_channels / pictures.shape[1]) ** 0.5)
            return F.pixel_unshuffle(pictures, cell).to(self.device)
        found = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist.mode()
        return (found.float() * vae.config.scaling_factor).to(self.device)

    @torch.no_grad()
    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Back, (B, 3, H, W) in 0..1 and float32."""
        vae = getattr(self.pipe, "vae", None)
        if vae is None:
            out = F.pixel_shuffle(latents, round((latents.shape[1] / 3) ** 0.5))
        else:
            out = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        return (out.float() / 2 + 0.5).clamp(0, 1)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in px of the pictures that the model is made for."""
        unet, vae = self.pipe.unet.config, getattr(self.pipe, "vae", None)
        cell = self.pipe.vae_scale_factor if vae is not None else round((unet.in_channels / 3) ** 0.5)
        return unet.sample_size * cell, unet.sample_size * cell

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, L, C), and the pooled (B, P) of a pipeline that has it."""
        found = self.pipe.encode_prompt(
            prompt=list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return found[0], found[2] if self.wide else None

    @torch.no_grad()
    def images(self, references: Sequence[torch.Tensor], dropped: torch.Tensor | None = None) -> torch.Tensor:
        """What `image_embeds` takes of one adapter, (B, R, ...); `dropped` (B,): as the pipeline puts it without guide.

        references: of each item (R, 3, h, w) in 0..1.
        """
        flat = [image for some in references for image in some]
        seen, nothing = self.pipe.encode_image([_pil(image) for image in flat], self.device, 1, self.hidden_states)
        if dropped is not None:
            each = dropped.to(seen.device).repeat_interleave(len(flat) // len(references))
            seen = torch.where(each.view(-1, *(1,) * (seen.ndim - 1)), nothing, seen)
        return seen.unflatten(0, (len(references), -1))

    def phrases(self, names: Sequence[tuple[str, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (B, R, L, C) and lengths (B, R), as `Phrases.set` takes them."""
        new = [name for name in dict.fromkeys(name for some in names for name in some) if name not in self.known]
        for name in new:
            found = encode(self.pipe, [name])
            self.known[name] = found.rows[0, 0], int(found.lengths[0, 0])
        most = max(self.known[name][1] for some in names for name in some)
        rows = [[_cut(self.known[name][0], most) for name in some] for some in names]
        lengths = torch.tensor([[self.known[name][1] for name in some] for some in names], device=self.device)
        return torch.stack([torch.stack(some) for some in rows]).to(self.device), lengths

    def added(self, images: torch.Tensor, pooled: torch.Tensor | None, size: tuple[int, int]) -> dict[str, Any]:
        """`added_cond_kwargs` of the UNet; size: (height, width) of the pictures in px."""
        if pooled is None:
            return {"image_embeds": [images]}
        times = torch.tensor([[*size, 0, 0, *size]], dtype=pooled.dtype, device=self.device).expand(len(pooled), -1)
        return {"image_embeds": [images], "text_embeds": pooled, "time_ids": times}

    def forward(
        self, batch: ObjectBatch, drops: Drops = NONE, references: Sequence[torch.Tensor] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor, torch.Tensor]:
        """(arguments, keyword arguments) of the UNet for a batch, what it is to predict, and which items (B,) bool have
        their references. `references`: others than the items' own, in the order of their names."""
        scheduler, items = self.pipe.scheduler, batch.items
        no_image, no_text = drops.of(batch.numbers, batch.seed)
        pictures = torch.stack([item.picture for item in items])
        latents = self.latents(pictures)
        noise = batch.noise(latents.shape).to(self.device)
        times = batch.times(scheduler.config.num_train_timesteps).to(self.device)
        prompts = ["" if dropped else item.prompt for item, dropped in zip(items, no_text.tolist(), strict=True)]
        text, pooled = self.text(prompts)
        images = self.images(references or [item.references for item in items], no_image)
        dtype = self.pipe.unet.dtype
        noisy = scheduler.add_noise(latents, noise, times).to(dtype)
        more = self.added(images.to(dtype), pooled, tuple(pictures.shape[2:]))  # type: ignore[arg-type]
        target = denoising_target(scheduler, latents, noise, times)
        return (noisy, times, text.to(dtype)), {"added_cond_kwargs": more, "return_dict": False}, target, ~no_image


def names_of(items: Sequence[TwoObjects]) -> list[tuple[str, ...]]:
    return [item.names for item in items]


def _pil(image: torch.Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(image.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def _cut(rows: torch.Tensor, most: int) -> torch.Tensor:
    return F.pad(rows[:most], (0, 0, 0, max(0, most - len(rows))))
