"""What differs between the pipelines that have IP-Adapters: Stable Diffusion 1.5 and XL, and FLUX.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

BASE_TOKENS = 4  # that a base adapter makes of an image; plus and full ones make more


@dataclass(frozen=True)
class Kind:
    """model: the pipeline's name for its denoiser. options: its argument whose entries reach the attention processors.

    no_encoder: what tells `load_ip_adapter` to look for no image encoder. encoder: that which its adapters read, where
    none is named or lies beside them. scale, plus_scale: published strengths of base adapters, and of others.
    half: the dtype on a GPU.
    """

    model: str
    options: str
    no_encoder: str
    encoder: str | None
    scale: float
    plus_scale: float
    half: torch.dtype

    def denoiser(self, pipe: Any) -> Any:
        return getattr(pipe, self.model)

    def adapted(self, pipe: Any) -> list[Any]:
        """The processors that have an adapter's weights."""
        return [one for one in self.denoiser(pipe).attn_processors.values() if hasattr(one, "to_k_ip")]

    def published(self, pipe: Any) -> float:
        """The strength to draw with, by the tokens that the adapter makes of an image."""
        tokens = getattr(self.adapted(pipe)[0], "num_tokens", (BASE_TOKENS,))[0]
        return self.scale if int(tokens) == BASE_TOKENS else self.plus_scale

    def size(self, pipe: Any) -> int:
        """Side of the picture that the pipeline makes unless told otherwise, px."""
        side = getattr(pipe, "default_sample_size", None) or self.denoiser(pipe).config.sample_size
        return side * pipe.vae_scale_factor


STABLE_DIFFUSION = Kind(
    "unet", "cross_attention_kwargs", "image_encoder_folder", None, scale=0.75, plus_scale=0.65, half=torch.float16
)
FLUX = Kind(
    "transformer", "joint_attention_kwargs", "image_encoder_pretrained_model_name_or_path",
    "openai/clip-vit-large-patch14", scale=1.0, plus_scale=1.0, half=torch.bfloat16,
)  # fmt: skip


def kind_of(pipe: Any) -> Kind:
    """By the pipeline, or by the name of its class."""
    name = pipe if isinstance(pipe, str) else type(pipe).__name__
    return FLUX if name.startswith("Flux") else STABLE_DIFFUSION
