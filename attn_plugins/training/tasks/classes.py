"""Telling pictures apart, for any picture classifier of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from attn_plugins.training.classifying import logits
from attn_plugins.training.pictures import PictureData
from attn_plugins.training.tasks.task import Task

APART = 1_000_000  # items from one seed's row to the next
Pictures = tuple[torch.Tensor, torch.Tensor]  # pixels (B, 3, S, S), labels (B,)


class ClassesTask(Task):
    """Pictures and their classes.

    Args:
        load: gives a classifier whose labels are the data's.
        data: pictures.
    """

    unit = "cross-entropy"

    def __init__(self, load: Callable[[], Any], data: PictureData) -> None:
        self.load_model, self.data = load, data

    def load(self) -> Any:
        return self.load_model()

    def batch(self, numbers: range, seed: int) -> Pictures:
        return _stacked([self.data.item(seed * APART + number) for number in numbers])

    def held_out(self, number: int) -> Pictures:
        return _stacked([self.data.held_out(number)])

    def losses(self, model: Any, batch: Pictures) -> torch.Tensor:
        pixels, labels = batch
        return F.cross_entropy(logits(model, pixels), labels, reduction="none")

    def inputs(self, batch: Pictures) -> Mapping[str, Any]:
        return {"pixel_values": batch[0]}

    def moved(self, batch: Pictures, device: torch.device) -> Pictures:
        return batch[0].to(device), batch[1].to(device)

    def __repr__(self) -> str:
        return repr(self.data)


def _stacked(items: list[tuple[torch.Tensor, int]]) -> Pictures:
    pixels, labels = zip(*items, strict=True)
    return torch.stack(pixels), torch.tensor(labels)
