"""Drawn pictures of two objects: the same for the same number, apart, of the size that is asked for; found again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attn_plugins.training.two_objects import APART, CLASSES, SIZE, DrawnObjects, Looks, reference
from attn_plugins.training.two_objects_finding import colour_of, find, likeness
from attn_plugins.training.two_objects_folder import FolderObjects, ObjectQuality

DATA = DrawnObjects()


def test_a_number_is_a_picture() -> None:
    one, again, other = DATA.item(3), DrawnObjects().item(3), DATA.held_out(3)
    assert torch.equal(one.picture, again.picture) and torch.equal(one.references, again.references)
    assert not torch.equal(one.picture, other.picture)
    assert not torch.equal(one.picture, DrawnObjects(seed=1).item(3).picture)
    assert one.picture.shape == (3, SIZE, SIZE) and one.references.shape == (2, 3, SIZE, SIZE)
    assert one.masks.shape == (2, SIZE, SIZE) and one.prompt == f"a {one.names[0]} and a {one.names[1]}"
    assert one.picture.aminmax().min >= -1 and one.picture.aminmax().max <= 1
    single = DATA.item(3, 1)
    assert len(single.names) == len(single.references) == 1 and single.prompt == f"a {single.names[0]}"


def test_what_is_in_the_pictures() -> None:
    import colorsys

    seen: set[str] = set()
    for number in range(40):
        item = DATA.item(number)
        assert item.names[0] != item.names[1]
        seen |= {*item.names}
        # areas as the paper's, apart from what a pixel's edge takes
        assert all(0.077 < float(mask.mean()) < 0.13 for mask in item.masks)
        assert float((item.masks[0] * item.masks[1]).sum()) == 0  # they do not touch
        assert float(item.masks[:, 0].max()) == float(item.masks[:, -1].max()) == 0
        hues = [360 * colorsys.rgb_to_hsv(*one.colour)[0] for one in item.looks]
        gap = abs(hues[0] - hues[1])
        assert min(gap, 360 - gap) >= APART - 1e-6
    assert seen == {*CLASSES}


def test_other_sizes_are_the_same_picture() -> None:
    small, big = DATA.item(5), DrawnObjects(size=96).item(5)
    assert big.names == small.names and big.looks == small.looks and big.picture.shape == (3, 96, 96)
    shrunk = torch.nn.functional.avg_pool2d(big.masks, 3)
    torch.testing.assert_close(shrunk, small.masks)
    with pytest.raises(ValueError, match="size=8: give 32 px or more"):
        DrawnObjects(size=8)


def test_objects_are_found_and_told_apart() -> None:
    read = 0
    for number in range(24):
        item = DATA.held_out(number)
        picture = (item.picture + 1) / 2
        masks = find(picture, item.names)
        if masks is None:
            continue
        read += 1
        for mask, true, one in zip(masks, item.masks, item.looks, strict=True):
            overlap = (mask & (true > 0.5)).sum() / (mask | (true > 0.5)).sum()
            assert overlap > 0.6
            assert (colour_of(picture, mask) - torch.tensor(one.colour)).abs().max() < 0.05
        assert DATA.told_apart(picture, item) == [1.0, 1.0]
        assert DATA.told_apart(picture, item, swapped=True) == [0.0, 0.0]
    assert read >= 22


def test_what_is_no_picture_of_two_objects() -> None:
    item = DATA.held_out(0)
    assert DATA.told_apart(torch.full((3, SIZE, SIZE), 0.1), item) is None
    assert DATA.told_apart(torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), item) is None
    one = DATA.held_out(0, 1)
    assert find((one.picture + 1) / 2, item.names) is None
    for name in CLASSES:
        mask = (reference(name, Looks((1.0, 0.0, 0.0))) - 1).abs().amax(0) > 0.5
        alike = {other: likeness(mask, other) for other in CLASSES}
        assert max(alike, key=lambda other: alike[other]) == name and alike[name] > 0.85


def test_swapped_references() -> None:
    item = DATA.held_out(2)
    swapped = DATA.swapped(item)
    middle = [swapped[index][:, 4:-4, 4:-4] for index in range(2)]
    for index, inside in enumerate(middle):
        other = torch.tensor(item.looks[1 - index].colour)
        assert (inside - other[:, None, None]).abs().amax(0).min() < 0.01  # its colour is the other's
        own = torch.tensor(item.looks[index].colour)
        assert (inside - own[:, None, None]).abs().amax(0).min() > 0.01


@pytest.fixture(scope="module")
def cutouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of two or more cut-outs, on white, transparent, and named by file."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("cutouts")
    colours = {"cat": (255, 0, 0), "big dog": (0, 255, 0), "hat": (0, 0, 255)}
    for name, colour in colours.items():
        for number in range(3):
            image = Image.new("RGBA", (40, 30 + number), (0, 0, 0, 0) if name != "hat" else (255, 255, 255, 255))
            image.paste(Image.new("RGBA", (20, 10), (*colour, 255)), (5, 5))
            if name == "big dog":
                image.save(folder / f"big_dog_{number}.png")
            else:
                (folder / name).mkdir(exist_ok=True)
                image.save(folder / name / f"{number}.png")
    return folder


def test_a_folder_of_cutouts(cutouts: Path) -> None:
    data = FolderObjects(cutouts, size=32)
    item, again = data.item(4), FolderObjects(cutouts, size=32).item(4)
    assert torch.equal(item.picture, again.picture)
    assert {name for number in range(12) for name in data.item(number).names} == {"cat", "big dog", "hat"}
    held = {data.held_out(number).names for number in range(4)}
    assert all(len(set(names)) == 2 for names in held)
    expected = {"cat": (1, 0, 0), "big dog": (0, 1, 0), "hat": (0, 0, 1)}
    for name, mask, image in zip(item.names, item.masks, item.references, strict=True):
        assert 0.08 <= float(mask.mean()) <= 0.7
        inside = ((item.picture + 1) / 2)[:, mask > 0.99].mean(1)
        torch.testing.assert_close(inside, torch.tensor(expected[name]).float(), atol=0.02, rtol=0)
        assert torch.equal(image[:, 0, 0], torch.ones(3))  # on white
    with pytest.raises(ValueError, match="no such folder"):
        FolderObjects(cutouts / "none")


class Seer:
    """A CLIP model that knows colours: red is a cat, green a dog, blue a hat, and of these it says so."""

    device = torch.device("cpu")
    names = ("a cat", "a big dog", "a hat")

    def __call__(self, pixels: torch.Tensor, text: str) -> Any:
        embeds = torch.nn.functional.one_hot(torch.tensor([self.names.index(text)]), 3).float()
        if text == "a hat":
            embeds = torch.tensor([[1.0, 0.0, 0.0]])  # its cut-outs are no hats
        return SimpleNamespace(image_embeds=pixels, text_embeds=embeds)


def see(text: list[str], images: list[Any], **_: Any) -> dict[str, Any]:
    import numpy as np

    pixels = torch.from_numpy(np.asarray(images[0]).copy()).float() / 255
    dark = pixels[pixels.amin(-1) < 0.5].mean(0)
    return {"pixels": Moved(dark[None]), "text": Moved(text[0])}


class Moved:
    def __init__(self, value: Any) -> None:
        self.value = value

    def to(self, _: Any) -> Any:
        return self.value


def test_the_object_quality_filter(cutouts: Path) -> None:
    data = FolderObjects(cutouts, size=32, quality=ObjectQuality(Seer(), see))  # type: ignore[arg-type]
    assert {name for number in range(12) for name in data.item(number).names} == {"cat", "big dog"}
    with pytest.raises(ValueError, match="no partner for"):
        FolderObjects(cutouts, size=32, quality=ObjectQuality(Seer(), see, alike=-0.5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 classes that the object quality filter leaves"):
        FolderObjects(cutouts, size=32, quality=ObjectQuality(Seer(), see, text=1.5))  # type: ignore[arg-type]
