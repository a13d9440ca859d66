"""A UNet of SDXL base's shape with random weights, and a tiny one for dry runs."""

from __future__ import annotations

from typing import Any

import torch

TEXT = 77
LEVELS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True, "addition_embed_type": "text_time",
}  # fmt: skip
SDXL = LEVELS | {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}  # fmt: skip
TINY = LEVELS | {
    "sample_size": 64, "block_out_channels": (32, 32, 64), "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4), "cross_attention_dim": 64, "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}  # fmt: skip


def random_unet(config: dict[str, Any], dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Weights of variance 1 / fan-in, biases 0, norms 1: activations, queries and keys keep unit size.

    Made without memory first and drawn in `dtype`: in float32 the parameters alone are 10 GB.
    """
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    unet = torch.nn.Module.to(unet, dtype).to_empty(device=device).eval()  # diffusers' own `to` warns of a cast
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
            else:
                weight.fill_(float(name.endswith("weight")))
    return unet


def random_inputs(config: dict[str, Any], latents: int, batch: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """What a denoising step hands to the UNet. The latents stand apart, as "sample": tomesd wants them by position."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator).to(device, dtype)

    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    size = torch.tensor([8.0 * latents, 8.0 * latents, 0, 0, 8.0 * latents, 8.0 * latents])
    return {
        "sample": draw(4, latents, latents),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": draw(TEXT, config["cross_attention_dim"]),
        "added_cond_kwargs": {"text_embeds": draw(pooled), "time_ids": size.expand(batch, -1).to(device, dtype)},
    }
