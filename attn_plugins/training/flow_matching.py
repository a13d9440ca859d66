"""Flow matching (arXiv 2210.02747): the loss, and the shift of the noise levels (arXiv 2403.03206).

At x = (1 - s) video + s noise the model predicts the velocity, noise - video, at the time 1000 s. That is what Wan
checkpoints were trained for, and the embedded model of moving digits too.
"""

from __future__ import annotations

import torch
from torch import nn

TIMES = 1000  # the models count noise levels in thousandths


def shifted(share: torch.Tensor, shift: float) -> torch.Tensor:
    """Noise levels of shares in [0, 1]: a shift above 1 moves them towards more noise.

    Neighbouring frames and pixels repeat each other, so that the same noise hides less of a longer or larger video.

    Raises:
        ValueError: a shift that is not above 0.
    """
    if shift <= 0:
        raise ValueError(f"shift={shift}: give a number above 0; 1 leaves levels as they are, Wan has 3 or 5")
    return shift * share / (1 + (shift - 1) * share)


def flow_loss(
    model: nn.Module, latents: torch.Tensor, prompts: torch.Tensor, levels: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of the predicted velocity, one per video, in float32.

    Args:
        model: a video transformer called as diffusers' Wan: latents, `timestep`, prompt tokens.
        latents, noise: (B, C, T, H, W).
        prompts: (B, L, D).
        levels: (B,) in [0, 1].

    Returns:
        (B,).
    """
    level = levels.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    flow = model(noisy, timestep=TIMES * levels, encoder_hidden_states=prompts, return_dict=False)[0]
    return (flow.float() - (noise - latents).float()).square().flatten(1).mean(dim=1)
