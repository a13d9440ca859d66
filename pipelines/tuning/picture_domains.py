"""Pictures of several domains for one classifier: handwriting and photographs, or folders of one's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_plugins.training.classifying import small_vit
from attn_plugins.training.photographs import PhotographParts
from attn_plugins.training.pictures import DigitPictures, Item, PictureData, PictureFolder
from attn_plugins.training.tasks import Task
from attn_plugins.training.tasks.classes import ClassesTask
from attn_plugins.training.tasks.mixed import MixedTask

SMALL_SIZE, SIZE = 112, 224  # px: of the small model's pictures, of a model's of one's own


@dataclass(frozen=True)
class AmongClasses:
    """A domain's pictures, its labels among those of all domains; a `PictureData`."""

    data: PictureData
    classes: tuple[str, ...]

    def item(self, number: int) -> Item:
        return self._labelled(self.data.item(number))

    def held_out(self, number: int) -> Item:
        return self._labelled(self.data.held_out(number))

    def _labelled(self, item: Item) -> Item:
        pixels, label = item
        return pixels, self.classes.index(self.data.classes[label])

    def __repr__(self) -> str:
        return repr(self.data)


def picture_domains(
    model: str | None,
    domains: Mapping[str, Sequence[Path]],
    *,
    size: int | None,
    start: Callable[[Task], Callable[[], Any]],
) -> dict[str, Task]:
    """Tasks of one picture classifier on the pictures of several domains, which share its head.

    Args:
        model: folder or hub name of a ViT; None: a small one, which `start` trains first, on all domains in turn.
        domains: one folder by name, of folders of pictures, a class each; a class of several domains is one class.
            None: handwritten digits, and parts of photographs.
        size: px; None: the small model's, else 224.

    Raises:
        ValueError: one domain alone, one that is not one folder, or classes that the model does not tell apart.
    """
    size = size or (SMALL_SIZE if model is None else SIZE)
    odd = [name for name, folders in domains.items() if len(folders) != 1]
    if domains and (odd or len(domains) < 2):
        raise ValueError(
            f"domains {list(domains)}, not of one folder {odd}: give two or more, each with one folder of folders of "
            "pictures"
        )
    found: dict[str, PictureData] = {name: PictureFolder(folders[0], size) for name, folders in domains.items()}
    found = found or {"digits": DigitPictures(size), "photographs": PhotographParts(size)}
    classes = tuple(dict.fromkeys(name for data in found.values() for name in data.classes))
    if model is not None:
        classes = _of_model(model, classes)
    named = {name: AmongClasses(data, classes) for name, data in found.items()}
    first = next(iter(named.values()))
    load: Callable[[], Any]
    if model is None:
        load = start(MixedTask([ClassesTask(lambda: small_vit(first, size), data) for data in named.values()]))
    else:
        from transformers import AutoModelForImageClassification

        load = functools.partial(AutoModelForImageClassification.from_pretrained, model)
    return {name: ClassesTask(load, data) for name, data in named.items()}


def _of_model(model: str, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The model's classes, if it has these by name; else these, if there are as many."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    names = tuple(config.id2label[label] for label in sorted(config.id2label))
    if set(classes) <= set(names):
        return names
    if len(names) != len(classes):
        raise ValueError(
            f"{model} tells {len(names)} classes, and the pictures have {len(classes)} that it does not have by name "
            f"({classes[0]}, ...): give it a head for them (from_pretrained(..., num_labels=...))"
        )
    return classes
