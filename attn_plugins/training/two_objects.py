"""Pictures of two different objects: each is of a named class, and its looks are known from a reference alone.

The prompt says "a circle and a cross"; which colour each has, only a cut-out of it on white tells. So a model gets both
right only if it knows which reference belongs to which name. Classes differ in their rough outlines, for colours are
decided early when a picture is drawn, fine outlines late. Made on the spot, without a download.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from attn_plugins.training.seeds import seeded

SIZE = 32  # units, side of a picture and of a reference, in which all lengths here are; px of the small ones
FINE = 96  # px, in which small pictures are drawn at least, and averaged
AREA = (0.08, 0.12)  # of an object, as a share of the picture
REFERENCE_AREA = (0.2, 0.3)
APART = 60.0  # degrees between the hues of the two objects, at least
GAP = 1.2  # units between two objects, and to the edges
Outline = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


OUTLINES: dict[str, Outline] = {
    "circle": lambda x, y: x.square() + y.square() <= 0.8,
    "triangle": lambda x, y: (y <= 0.8) & (1.9 * x.abs() - y <= 0.8),
    "cross": lambda x, y: (torch.minimum(x.abs(), y.abs()) <= 0.25) & (torch.maximum(x.abs(), y.abs()) <= 1.0),
    "ring": lambda x, y: ((x.square() + y.square()).sqrt() - 0.75).abs() <= 0.22,
    "bar": lambda x, y: (x.abs() <= 1.0) & (y.abs() <= 0.33),
    "pole": lambda x, y: (x.abs() <= 0.33) & (y.abs() <= 1.0),
}
CLASSES = tuple(OUTLINES)


def _measured(name: str) -> tuple[float, tuple[float, float]]:
    """Area of an outline in its own units, and how far it reaches from its middle, across and down; by counting."""
    axis = torch.linspace(-1.5, 1.5, 301)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    inside = OUTLINES[name](x, y)
    return float(inside.float().mean()) * 9, (float(x[inside].abs().max()), float(y[inside].abs().max()))


_AREAS = {name: _measured(name)[0] for name in CLASSES}
_HALVES = {name: _measured(name)[1] for name in CLASSES}


def radius_of(name: str, area: float) -> float:
    """Units that make 1 of an outline's, so that it covers `area` of a picture."""
    return math.sqrt(area / _AREAS[name]) * SIZE


@dataclass(frozen=True)
class Looks:
    """What a reference alone tells: the colour, RGB in 0..1."""

    colour: tuple[float, float, float]


def coverage(name: str, radius: float, middle: tuple[float, float], size: int = SIZE) -> torch.Tensor:
    """How much of each px of a picture of (size, size) px an object covers; radius and middle in units."""
    finer = max(1, FINE // size)
    axis = (torch.arange(size * finer) + 0.5) * (SIZE / (size * finer))
    y, x = torch.meshgrid((axis - middle[1]) / radius, (axis - middle[0]) / radius, indexing="ij")
    return F.avg_pool2d(OUTLINES[name](x, y).float()[None], finer)[0]


def painted(looks: Looks, ground: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """An object on a picture (3, H, W) in 0..1, where its mask (H, W) is."""
    return ground + mask * (torch.tensor(looks.colour)[:, None, None] - ground)


@dataclass
class TwoObjects:
    """A picture (3, H, W) in -1..1; names, and a reference (3, h, w) in 0..1 and a mask (H, W) in 0..1 of each object;
    looks, where they are known."""

    picture: torch.Tensor
    names: tuple[str, ...]
    references: torch.Tensor
    masks: torch.Tensor
    looks: tuple[Looks, ...] = ()

    @property
    def prompt(self) -> str:
        return " and ".join(f"a {name}" for name in self.names)


class ObjectData(Protocol):
    """Pictures by number: the same number gives the same one, whoever asks and whenever."""

    def item(self, number: int, objects: int = 2) -> TwoObjects:
        """The training picture `number` (without end)."""

    def held_out(self, number: int, objects: int = 2) -> TwoObjects:
        """One that is never trained on."""


@dataclass(frozen=True)
class DrawnObjects:
    """Objects of six classes on a dark ground. Their places, sizes and looks are drawn anew for each picture.

    Args:
        seed: other ones give other pictures.
        size: px, of pictures and references.

    Raises:
        ValueError: pictures below 32 px.
    """

    seed: int = 0
    size: int = SIZE

    def __post_init__(self) -> None:
        if self.size < SIZE:
            raise ValueError(f"size={self.size}: give {SIZE} px or more")

    def item(self, number: int, objects: int = 2) -> TwoObjects:
        return self._with_references("train", number, objects)

    def held_out(self, number: int, objects: int = 2) -> TwoObjects:
        return self._with_references("held out", number, objects)

    def scene(self, split: str, number: int, objects: int = 2) -> TwoObjects:
        """A picture without its references."""
        generator = seeded(self.seed, "two objects", split, number, objects)
        draw = functools.partial(_uniform, generator)
        names = tuple(CLASSES[int(i)] for i in torch.randperm(len(CLASSES), generator=generator)[:objects])
        hue = draw(0, 360)
        looks = []
        for _ in names:
            looks.append(Looks(_rgb(hue, draw(0.75, 1.0), draw(0.8, 1.0))))
            hue += draw(APART, 360 - APART)
        picture = torch.tensor([draw(0.04, 0.16) for _ in range(3)])[:, None, None].expand(3, self.size, self.size)
        masks = torch.stack(_placed(names, draw, self.size))
        for mask, one in zip(masks, looks, strict=True):
            picture = painted(one, picture, mask)
        return TwoObjects(2 * picture - 1, names, torch.empty(len(names), 0), masks, tuple(looks))

    def swapped(self, item: TwoObjects) -> torch.Tensor:
        """References of the same names that have each other's looks."""
        return torch.stack(
            [reference(*pair, size=self.size) for pair in zip(item.names, item.looks[::-1], strict=True)]
        )

    def told_apart(self, picture: torch.Tensor, item: TwoObjects, swapped: bool = False) -> list[float] | None:
        """Whether each of the item's objects has its own looks in a picture (3, H, W) in 0..1: 1, or 0 if the colour is
        nearer to that of the other; with `swapped`, of the looks swapped. None where both are not to be found."""
        from attn_plugins.training.two_objects_finding import colour_of, find

        masks = find(picture, item.names)
        if masks is None:
            return None
        looks = item.looks[::-1] if swapped else item.looks
        found = [colour_of(picture, mask) for mask in masks]
        wanted = F.normalize(torch.tensor([one.colour for one in looks]), dim=1)
        near = [wanted @ F.normalize(colour, dim=0) for colour in found]
        return [float(one[index] > one[1 - index]) for index, one in enumerate(near)]

    def _with_references(self, split: str, number: int, objects: int) -> TwoObjects:
        made = self.scene(split, number, objects)
        draw = functools.partial(_uniform, seeded(self.seed, "references", split, number, objects))
        pairs = zip(made.names, made.looks, strict=True)
        made.references = torch.stack([reference(*pair, draw(*REFERENCE_AREA), self.size) for pair in pairs])
        return made


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def reference(name: str, looks: Looks, area: float = 0.25, size: int = SIZE) -> torch.Tensor:
    """The object cut out on white, (3, size, size) in 0..1."""
    mask = coverage(name, radius_of(name, area), (SIZE / 2, SIZE / 2), size)
    return painted(looks, torch.ones(3, size, size), mask)


def _placed(names: Sequence[str], draw: Callable[[float, float], float], size: int) -> list[torch.Tensor]:
    """Masks of one or two objects beside or above each other, with a gap between them and to the edges."""
    radii = [radius_of(name, draw(*AREA)) for name in names]
    axes = [0, 1] if draw(0, 1) < 0.5 else [1, 0]
    rooms = [_room(names, radii, axis) for axis in axes]
    if max(rooms) < 0:  # small ones fit
        radii = [radius_of(name, AREA[0]) for name in names]
        rooms = [_room(names, radii, axis) for axis in axes]
    axis, room = next((axis, room) for axis, room in zip(axes, rooms, strict=True) if room >= 0 or room == max(rooms))
    cuts = sorted(draw(0, room) for _ in names)
    order = list(range(len(names))) if draw(0, 1) < 0.5 else list(range(len(names)))[::-1]
    masks: dict[int, torch.Tensor] = {}
    start = GAP
    for place, index in enumerate(order):
        halves = [half * radii[index] for half in _HALVES[names[index]]]
        start += halves[axis] + cuts[place] - (cuts[place - 1] if place else 0.0)
        across = halves[1 - axis] + GAP
        middle = [0.0, 0.0]
        middle[axis], middle[1 - axis] = start, draw(across, SIZE - across)
        masks[index] = coverage(names[index], radii[index], (middle[0], middle[1]), size)
        start += halves[axis] + GAP
    return [masks[index] for index in range(len(names))]


def _room(names: Sequence[str], radii: Sequence[float], axis: int) -> float:
    """Units that objects in a row leave."""
    taken = sum(2 * _HALVES[name][axis] * radius for name, radius in zip(names, radii, strict=True))
    return SIZE - taken - GAP * (len(names) + 1)


def _rgb(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    import colorsys

    return colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
