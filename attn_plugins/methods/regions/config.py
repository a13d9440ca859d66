"""The options of regions."""

from __future__ import annotations

import hashlib
import math
import numbers
from dataclasses import dataclass, field
from typing import Any

import torch

from attn_plugins.method import MethodConfig
from attn_plugins.methods.regions.areas import Area, area_of
from attn_plugins.ops.checks import BACKENDS

MODES = ("couple", "masked")
SELF = ("full", "masked")
GUIDANCE = ("auto", "none", "batched")


@dataclass(frozen=True)
class Embedding:
    """A prompt as a text encoder gives it, (L, C); equal to any other of the same values."""

    digest: str
    values: torch.Tensor = field(compare=False, repr=False)


@dataclass(frozen=True)
class Region:
    """A part of the picture, its prompt, and what its mask is multiplied by."""

    area: Area
    prompt: str | Embedding
    weight: float = 1.0

    @property
    def name(self) -> str:
        return f"region {self.prompt!r}" if isinstance(self.prompt, str) else f"region of {self.area.told}"


@dataclass(frozen=True)
class RegionsConfig(MethodConfig):
    """Which part of the picture is for which prompt.

    Args:
        regions: rows (where, prompt) or (where, prompt, weight). where: a box (left, top, right, bottom) in fractions
            of the picture, or a mask, hard or soft, of any size: (H, W), of a video also (T, H, W), as a tensor, array,
            PIL picture or path. prompt: a string, or the embeddings (L, C) that the model takes. weight: what the mask
            is multiplied by where masks overlap. What no mask covers is for the pipeline's own prompt.
        mode: "couple" (attention couple): attention by each prompt alone, added up in the proportion of the masks, so
            that soft ones blend. "masked" (arXiv 2501.03059): each token sees the prompt of its largest mask alone.
        self_attention: "full", or "masked": a token sees the tokens of its own region alone, the uncovered being one.
        base: of "couple", what the pipeline's own prompt weighs in every token, beside masks of 1.
        guidance: which batch items the prompts are for, the others having the pipeline's own alone. "auto": as the
            pipeline guides, of a bare model all; "none": all; "batched": the second half, the first being negative.
        max_sequence_length: tokens of a prompt, of pipelines that can be told. None: the default of their call.
        backend: "auto", "cpu", "triton" or "reference".
    """

    regions: Any = ()
    mode: str = "couple"
    self_attention: str = "full"
    base: float = 0.0
    guidance: str = "auto"
    max_sequence_length: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        given = self.regions
        if not isinstance(given, (tuple, list)) or not given:
            raise ValueError(f"regions={given!r}: give at least one (box or mask, prompt)")
        rows = tuple(_region(number, row) for number, row in enumerate(given, 1))
        object.__setattr__(self, "regions", rows)
        for name, legal in (("mode", MODES), ("self_attention", SELF), ("guidance", GUIDANCE), ("backend", BACKENDS)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r}: legal are {', '.join(legal)}")
        if not isinstance(self.base, numbers.Real) or not 0 <= float(self.base) < math.inf:
            raise ValueError(f"base={self.base!r}: give a number, 0 or more")
        if self.base and self.mode == "masked":
            raise ValueError(f"base={self.base!r}: with mode='masked' a token sees one prompt alone; use mode='couple'")
        length = self.max_sequence_length
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise ValueError(f"max_sequence_length={length!r}: give a number of tokens, or None")

    def to_options(self) -> dict[str, Any]:
        """As of every method; a mask or an embedding that no file holds is told, and cannot be read back."""
        options = {**super().to_options()}
        options["regions"] = [
            [region.area.told, _told(region.prompt), *([] if region.weight == 1 else [region.weight])]
            for region in self.regions
        ]
        return options


def _region(number: int, row: Any) -> Region:
    if isinstance(row, Region):
        return row
    if not isinstance(row, (tuple, list)) or len(row) not in (2, 3):
        raise ValueError(
            f"regions: number {number} is no (box or mask, prompt): give rows as in [((0, 0, 0.5, 1), 'a cat')]"
        )
    where, prompt, weight = (*row, 1.0)[:3]
    try:
        area = area_of(where)
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise type(error)(f"regions: number {number}{_named(prompt)}: {error}") from error
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not 0 < float(weight) < math.inf:
        raise ValueError(f"regions: number {number}{_named(prompt)} has weight {weight!r}: give a number above 0")
    return Region(area, _prompt(number, prompt), float(weight))


def _prompt(number: int, prompt: Any) -> str | Embedding:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"regions: number {number} has an empty prompt: say what is there")
        if prompt.startswith(_EMBEDDING):
            raise ValueError(f"regions: number {number}: {prompt!r} stands for one that was never in a file: give it")
        return prompt
    if isinstance(prompt, Embedding):
        return prompt
    if not isinstance(prompt, torch.Tensor) or not prompt.is_floating_point():
        raise TypeError(
            f"regions: number {number} has a prompt of {type(prompt).__name__}: give a string, or embeddings"
        )
    values = prompt.detach()[0] if prompt.ndim == 3 and len(prompt) == 1 else prompt.detach()
    if values.ndim != 2 or not values.numel():
        raise ValueError(f"regions: number {number} has embeddings {tuple(prompt.shape)}: they are (tokens, channels)")
    data = values.float().cpu().contiguous()
    return Embedding(hashlib.sha256(f"{tuple(data.shape)}".encode() + data.numpy().tobytes()).hexdigest(), values)


_EMBEDDING = "embedding in memory"


def _told(prompt: str | Embedding) -> str:
    return prompt if isinstance(prompt, str) else f"{_EMBEDDING}: {'x'.join(map(str, prompt.values.shape))}"


def _named(prompt: Any) -> str:
    return f" ({prompt!r})" if isinstance(prompt, str) else ""
