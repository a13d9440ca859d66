"""LPIPS (Zhang et al., 2018), by its authors' package where that is installed. Nothing is downloaded for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from attn_plugins.metrics.frames import checked

SMALLEST = 64  # px: AlexNet's layers leave nothing of smaller pictures; those are enlarged


def why_not() -> str | None:
    """Why there is no LPIPS on this machine, in one sentence, or None."""
    if importlib.util.find_spec("lpips") is None or importlib.util.find_spec("torchvision") is None:
        return "LPIPS left out: it needs the packages lpips and torchvision (pip install lpips torchvision)"
    if not _backbone().is_file():
        return (
            f"LPIPS left out: the weights of its AlexNet are not on this machine ({_backbone().name} of torchvision); "
            "python -c 'import lpips; lpips.LPIPS()' fetches them once"
        )
    return None


class Perceptual:
    """LPIPS of AlexNet, version 0.1: 0 where two pictures are equal, about 1 where they have nothing in common.

    Raises:
        ImportError: no package, or none of the weights that it needs.
    """

    def __init__(self, network: Any = None) -> None:
        if network is None:
            reason = why_not()
            if reason is not None:
                raise ImportError(reason)
            import lpips

            network = lpips.LPIPS(net="alex", verbose=False)
        self.network = network.eval()

    @torch.no_grad()
    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Args: a, b (..., C, H, W) float in 0..1, C 1 or 3. Returns (...), one number a picture.

        Raises:
            ValueError: shapes that differ, integer pictures.
        """
        a, b = checked(a, b, 1.0)
        shape = a.shape[:-3]
        found = [
            self.network(*(_prepared(t) for t in pair)).flatten()
            for pair in zip(*(t.reshape(-1, *t.shape[-3:]).split(8) for t in (a, b)), strict=True)
        ]
        return torch.cat(found).view(shape)


def _prepared(pictures: torch.Tensor) -> torch.Tensor:
    """(n, C, H, W) in 0..1 -> (n, 3, H', W') in -1..1, small ones enlarged by whole pixels."""
    times = -(-SMALLEST // min(pictures.shape[-2:]))
    larger = pictures.repeat_interleave(times, -2).repeat_interleave(times, -1) if times > 1 else pictures
    return larger.expand(-1, 3, -1, -1).float() * 2 - 1


def _backbone() -> Path:
    """Where torchvision keeps the weights that lpips builds on."""
    from torchvision.models import AlexNet_Weights

    return Path(torch.hub.get_dir()) / "checkpoints" / Path(AlexNet_Weights.IMAGENET1K_V1.url).name
