"""Where training videos come from: made on the fly (moving digits), or a folder of latents made beforehand."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from attn_plugins.training.moving_digits import empty_prompt, moving_digits, prompt_embeds
from attn_plugins.training.seeds import in_epochs, seeded

HELD_OUT_SHARE = 10  # one in so many files of a folder is never trained on
EMPTY = "empty.safetensors"
Item = tuple[torch.Tensor, torch.Tensor]


class VideoData(Protocol):
    """Videos by number: the same number gives the same video, whoever asks and whenever."""

    def item(self, number: int) -> Item:
        """Latents (C, T, H, W) and prompt tokens (L, D) of the training video `number` (0 and up, without end)."""

    def held_out(self, number: int) -> Item:
        """The same of videos that are never trained on."""

    def empty(self) -> torch.Tensor | None:
        """The tokens (L, D) of a prompt that says nothing, or None: prompts are then never dropped."""


@dataclass(frozen=True)
class MovingDigits:
    """Two digits that move, for the embedded model: pixels are its latents.

    frames: of a video. size: side of the canvas in px, even (the model takes patches of 2 x 2).
    """

    frames: int = 16
    size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size % 2:
            raise ValueError(f"size={self.size}: must be even, the model takes patches of 2 x 2 px")
        self.item(0)  # impossible sizes, or no scikit-learn: say so now

    def item(self, number: int) -> Item:
        return self._draw("train", number)

    def held_out(self, number: int) -> Item:
        return self._draw("test", number)

    def empty(self) -> torch.Tensor:
        return empty_prompt(1)[0]

    def _draw(self, split: str, number: int) -> Item:
        generator = seeded(self.seed, split, number)
        video, labels = moving_digits(1, self.frames, self.size, generator, split=split)
        return video[0], prompt_embeds(labels)[0]


@dataclass(frozen=True)
class LatentFolder:
    """A folder of `*.safetensors`, a video each: `latents` (C, T, H, W), normalised as the transformer takes them, and
    `prompt_embeds` (L, D). All have the same sizes. The last tenth by name is held out. A file called
    `empty.safetensors` holds the `prompt_embeds` of the empty prompt; without it prompts are never dropped.

    Raises:
        ValueError: not a folder, fewer than two videos, a tensor that is missing or of another size.
    """

    folder: Path
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: no such folder; give one of .safetensors files, a video each")
        if len(self._files) < 2:
            raise ValueError(
                f"{self.folder}: {len(self._files)} videos; give 2 or more .safetensors files with `latents` "
                "(C, T, H, W) and `prompt_embeds` (L, D)"
            )
        first = _sizes(self._files[0])
        for file in self._files:
            if _sizes(file) != first:
                raise ValueError(f"{file}: {_sizes(file)}, where {self._files[0].name} has {first}: one size a folder")

    def item(self, number: int) -> Item:
        """Every file once, in an order of its own, before any comes again."""
        return _read(in_epochs(self._files[: -self._kept], number, self.seed))

    def held_out(self, number: int) -> Item:
        files = self._files[-self._kept :]
        return _read(files[number % len(files)])

    def empty(self) -> torch.Tensor | None:
        file = self.folder / EMPTY
        return _load(file)["prompt_embeds"].float() if file.is_file() else None

    @functools.cached_property
    def _files(self) -> Sequence[Path]:
        return sorted(file for file in self.folder.glob("*.safetensors") if file.name != EMPTY)

    @property
    def _kept(self) -> int:
        return max(1, len(self._files) // HELD_OUT_SHARE)


def _sizes(file: Path) -> dict[str, tuple[int, ...]]:
    """The sizes of what a file must have; reads its header only."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        found = {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    sizes = {"latents": found.get("latents", ()), "prompt_embeds": found.get("prompt_embeds", ())}
    if [len(size) for size in sizes.values()] != [4, 2]:
        raise ValueError(f"{file}: has {found}; give `latents` (C, T, H, W) and `prompt_embeds` (L, D)")
    return sizes


def _read(file: Path) -> Item:
    content = _load(file)
    return content["latents"].float(), content["prompt_embeds"].float()


def _load(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)
