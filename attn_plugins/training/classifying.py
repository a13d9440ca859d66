"""Training a picture classifier of transformers, and judging it on pictures that are held out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from attn_plugins.training.loop import LoopSettings, train
from attn_plugins.training.pictures import PictureData, picture_batch

SMALL: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384, "patch_size": 16,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
PLACES = 0.1  # size of the first position embeddings


def small_vit(data: PictureData, size: int, seed: int = 0) -> Any:
    """A ViTForImageClassification of 0.8M parameters, with new weights; the global random state is kept."""
    from transformers import ViTConfig, ViTForImageClassification

    names = dict(enumerate(data.classes))
    labels = {name: label for label, name in names.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTForImageClassification(ViTConfig(**SMALL, image_size=size, id2label=names, label2id=labels))
    side, width = size // SMALL["patch_size"], SMALL["hidden_size"]
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[0, 1:] = PLACES * waves(side, width)
    return model


def waves(side: int, width: int) -> torch.Tensor:
    """Rows and columns of a square of patches as sines and cosines, (side * side, width): a model that begins with them
    need not find out first which patches are neighbours."""
    rates = 1 / 10_000 ** (torch.arange(width // 4) / (width // 4))
    axes = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    angles = [axis.flatten()[:, None] * rates for axis in axes]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


def muon(model: Any, lr: float) -> list[torch.optim.Optimizer]:
    """For a small model from the start: Muon for the matrices of its layers, AdamW for the rest."""
    matrices = [part for part in model.vit.layers.parameters() if part.ndim == 2]
    rest = [part for part in model.parameters() if all(part is not matrix for matrix in matrices)]
    first = torch.optim.Muon(matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    return [first, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)]


def logits(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(B, classes) in float32; a model that was made for another size has its position embeddings resized."""
    config = getattr(model, "module", model).config
    made_for = getattr(config, "image_size", None)
    resized = {} if made_for in (None, pixels.shape[-1]) else {"interpolate_pos_encoding": True}
    if "dinov2" in config.model_type:
        resized = {}  # it resizes them whatever the size
    return model(pixel_values=pixels, **resized).logits.float()


def train_classifier(
    accelerator: Any,
    model: Any,
    data: PictureData,
    settings: LoopSettings,
    folder: Path,
    *,
    run: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[float]:
    """Train by cross-entropy what of `model` has gradients on, in place. `run`, `options`: as of `loop.train`."""

    def loss(wrapped: Any, step: int) -> torch.Tensor:
        pixels, labels = picture_batch(
            data, step, settings.batch, rank=accelerator.process_index, processes=accelerator.num_processes
        )
        return F.cross_entropy(logits(wrapped, pixels.to(accelerator.device)), labels.to(accelerator.device))

    return train(accelerator, model, loss, settings, folder, run={"data": repr(data), **(run or {})}, **options)


@torch.no_grad()
def held_out_hits(accelerator: Any, model: Any, data: PictureData, settings: LoopSettings) -> list[bool]:
    """Whether each of the `held_out` pictures is told right, always the same ones; processes share the work."""
    count, size = settings.held_out, max(settings.batch, 16)
    hits = torch.zeros(count, device=accelerator.device)
    was_training = model.training
    model.eval()
    for first in range(accelerator.process_index * size, count, accelerator.num_processes * size):
        items = [data.held_out(number) for number in range(first, min(first + size, count))]
        with accelerator.autocast():
            found = logits(model, torch.stack([pixels for pixels, _ in items]).to(accelerator.device))
        right = torch.tensor([label for _, label in items], device=found.device)
        hits[first : first + len(items)] = (found.argmax(-1) == right).float()
    model.train(was_training)
    return (accelerator.reduce(hits, "sum") > 0).tolist()
