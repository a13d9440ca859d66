"""Pictures of two objects made of a person's own cut-outs, and which of these are good enough (object quality)."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attn_plugins.training.pictures import HELD_OUT_SHARE, SUFFIXES
from attn_plugins.training.seeds import in_epochs, seeded
from attn_plugins.training.two_objects import TwoObjects

WHITE = 0.97  # of the darkest channel: what is brighter is the ground, in files without transparency
FILLED = (0.7, 0.98)  # of its half of the picture that an object's box fills, in one direction at least
TRIES = 100  # partners that are looked at for an object


@dataclass(frozen=True)
class ObjectQuality:
    """Which cut-outs and pairs are used, as a CLIP model sees them: each must look like its name, and the two unlike.

    Args:
        model, processor: of transformers, as of `CLIPModel.from_pretrained`.
        text: cosine of an object and its name, at least.
        alike: cosine of the two objects, at most.
    """

    model: Any
    processor: Any
    text: float = 0.2
    alike: float = 0.85

    @torch.no_grad()
    def seen(self, image: Any, name: str) -> tuple[torch.Tensor, float]:
        """An image's embedding of length 1, and its cosine with its name."""
        inputs = self.processor(text=[f"a {name}"], images=[image], return_tensors="pt", padding=True)
        found = self.model(**{key: value.to(self.model.device) for key, value in inputs.items()})
        image_embeds, text_embeds = (
            torch.nn.functional.normalize(part[0].float().cpu(), dim=-1)
            for part in (found.image_embeds, found.text_embeds)
        )
        return image_embeds, float(image_embeds @ text_embeds)


@dataclass(frozen=True)
class FolderObjects:
    """Pairs of cut-outs from a folder, on a plain ground: files `<class>/<any>.png`, or `<class>_<number>.png`.

    A cut-out has a transparent ground, or a white one. The last tenth of each class by name is held out.

    Args:
        folder: of the cut-outs.
        size: px, of pictures and references.
        seed: of pairs, places and grounds.
        quality: which to use; None: all.

    Raises:
        ValueError: not a folder, fewer than two classes, a class of fewer than two cut-outs; after the choice too.
    """

    folder: Path
    size: int = 512
    seed: int = 0
    quality: ObjectQuality | None = None

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: no such folder; give one of cut-outs, <class>/<any>.png")
        classes = {name for name, _ in self._split[0]} | {name for name, _ in self._split[1]}
        if len(classes) < 2:
            chosen = "" if self.quality is None else " that the object quality filter leaves"
            raise ValueError(f"{self.folder}: cut-outs of {len(classes)} classes{chosen}; give two classes or more")
        self._partner(self._split[0], 0, "train")  # a choice that leaves no pair: say so now
        self._partner(self._split[1], 0, "held out")

    def item(self, number: int, objects: int = 2) -> TwoObjects:
        return self._made("train", self._split[0], number, objects)

    def held_out(self, number: int, objects: int = 2) -> TwoObjects:
        return self._made("held out", self._split[1], number, objects)

    def __repr__(self) -> str:
        chosen = "" if self.quality is None else f", text={self.quality.text}, alike={self.quality.alike}"
        return f"FolderObjects({self.folder.name!r}, size={self.size}, seed={self.seed}{chosen})"

    @functools.cached_property
    def _split(self) -> tuple[list[tuple[str, Path]], list[tuple[str, Path]]]:
        by_class: dict[str, list[Path]] = {}
        for file in sorted(self.folder.rglob("*")):
            if file.suffix.lower() in SUFFIXES:
                name = file.parent.name if file.parent != self.folder else re.sub(r"[\d_\-. ]+$", "", file.stem)
                by_class.setdefault(name.replace("_", " "), []).append(file)
        train, held_out = [], []
        for name, files in by_class.items():
            good = [file for file in files if self.quality is None or self._seen(name, file)[1] >= self.quality.text]
            if len(good) < 2:
                if self.quality is not None:
                    continue
                raise ValueError(f"{self.folder}: {len(good)} cut-outs of {name!r}; give two or more of every class")
            kept = max(1, len(good) // HELD_OUT_SHARE)
            train += [(name, file) for file in good[:-kept]]
            held_out += [(name, file) for file in good[-kept:]]
        return train, held_out

    @functools.cache  # noqa: B019  (frozen, and one for a run)
    def _seen(self, name: str, file: Path) -> tuple[torch.Tensor, float]:
        from PIL import Image

        assert self.quality is not None
        white = self._fitted(self._cut(file), self.size, self.size, 0.9)
        pixels = (1 + white[3] * (white[:3] - 1)).mul(255).round().to(torch.uint8).permute(1, 2, 0)
        return self.quality.seen(Image.fromarray(pixels.numpy()), name)

    def _partner(self, files: list[tuple[str, Path]], number: int, split: str) -> list[tuple[str, Path]]:
        """Two of different classes."""
        first = in_epochs(files, number, self.seed)
        draw = seeded(self.seed, "partner", split, number)
        for _ in range(TRIES):
            other = files[int(torch.randint(len(files), (), generator=draw))]
            if other[0] == first[0]:
                continue
            if self.quality is None:
                return [first, other]
            if float(self._seen(*first)[0] @ self._seen(*other)[0]) <= self.quality.alike:
                return [first, other]
        raise ValueError(
            f"{self.folder}: no partner for {first[1].name} among {len(files)} cut-outs; give more classes, or "
            "allow for more likeness"
        )

    def _made(self, split: str, files: list[tuple[str, Path]], number: int, objects: int) -> TwoObjects:
        pair = self._partner(files, number, split)[:objects]
        draw = seeded(self.seed, "places", split, number)
        beside, ground = torch.rand(2, generator=draw).tolist()[0] < 0.5, torch.rand(3, 1, 1, generator=draw)
        picture = ground.expand(3, self.size, self.size)
        masks, references = [], []
        for place, (_, file) in enumerate(pair):
            share = FILLED[0] + (FILLED[1] - FILLED[0]) * torch.rand((), generator=draw).item()
            cut, half = self._cut(file), self.size // len(pair)
            height, width = (self.size, half) if beside else (half, self.size)
            layer = torch.zeros(4, self.size, self.size)
            part = self._fitted(cut, height, width, share)
            top, left = (0, place * half) if beside else (place * half, 0)
            layer[:, top : top + height, left : left + width] = part
            picture = picture + layer[3] * (layer[:3] - picture)
            masks.append(layer[3])
            whole = self._fitted(cut, self.size, self.size, 0.9)
            references.append(1 + whole[3] * (whole[:3] - 1))
        names = tuple(name for name, _ in pair)
        return TwoObjects(2 * picture - 1, names, torch.stack(references), torch.stack(masks))

    def _cut(self, file: Path) -> torch.Tensor:
        """(4, h, w) in 0..1 of the object's box: RGB, and its mask."""
        import numpy as np
        from PIL import Image

        with Image.open(file) as image:
            pixels = torch.from_numpy(np.asarray(image.convert("RGBA")).copy()).permute(2, 0, 1).float() / 255
        if float(pixels[3].min()) == 1.0:
            pixels[3] = (pixels[:3].amin(0) < WHITE).float()
        inside = pixels[3] > 0.5
        if not bool(inside.any()):
            raise ValueError(f"{file}: no object on a transparent or white ground")
        rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
        return pixels[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

    def _fitted(self, cut: torch.Tensor, height: int, width: int, share: float) -> torch.Tensor:
        """The cut-out in the middle of (4, height, width), filling `share` of it in one direction."""
        scale = share * min(height / cut.shape[1], width / cut.shape[2])
        size = [max(1, int(side * scale)) for side in cut.shape[1:]]
        small = torch.nn.functional.interpolate(cut[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)
        out = torch.zeros(4, height, width)
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        out[:, top : top + size[0], left : left + size[1]] = small
        return out
