"""Labelled pictures: the same by number for all who ask, held-out ones apart, folders of a person's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

from attn_plugins.training.moving_digits import TEST_FROM, digit_images
from attn_plugins.training.pictures import NOISE, DigitPictures, PictureFolder, picture_batch


def test_a_number_is_a_picture() -> None:
    data = DigitPictures(48)
    torch.rand(3)  # somebody else draws
    state = torch.get_rng_state()
    first, label = data.item(7)
    assert torch.equal(torch.get_rng_state(), state)
    again, same = DigitPictures(48).item(7)
    assert torch.equal(first, again) and label == same and first.shape == (3, 48, 48)
    assert not torch.equal(first, data.item(8)[0]) and not torch.equal(first, data.held_out(7)[0])
    assert not torch.equal(first, DigitPictures(48, seed=1).item(7)[0])
    assert -12 * NOISE < first.min() < 0 and 1.5 < first.max() < 2 + 12 * NOISE  # no ink is 0, and is most of it


def test_held_out_pictures_are_of_digits_that_are_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = digit_images()
    marked = torch.zeros_like(images)
    marked[TEST_FROM:] = 1
    monkeypatch.setattr("attn_plugins.training.pictures.digit_images", lambda: (marked, labels))
    data = DigitPictures(32)
    assert all((data.item(number)[0] > 1).sum() == 0 for number in range(10))
    assert all((data.held_out(number)[0] > 1).sum() > 1000 for number in range(10))


def test_labels_are_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image filled with an ink of its own class: the strongest ink on the canvas tells the label."""
    images, labels = digit_images()
    inks = ((labels + 10) / 20).view(-1, 1, 1).expand_as(images).contiguous()
    monkeypatch.setattr("attn_plugins.training.pictures.digit_images", lambda: (inks, labels))
    monkeypatch.setattr("attn_plugins.training.pictures.NOISE", 0.0)
    data = DigitPictures(64)
    for number in range(20):
        pixels, label = data.item(number)
        ink = pixels[0] / 2
        assert abs(ink.max() - (label + 10) / 20) < 1e-5  # scraps have at most half of 0.95
        assert ((ink - (label + 10) / 20).abs() < 1e-5).sum() >= (0.7 * 64 - 1) ** 2


def test_batches_of_two_processes_are_one() -> None:
    data = DigitPictures(16)
    whole = picture_batch(data, 3, 4)
    parts = [picture_batch(data, 3, 2, rank=rank, processes=2) for rank in range(2)]
    assert all(torch.equal(torch.cat(halves), one) for halves, one in zip(zip(*parts, strict=True), whole, strict=True))


def test_a_folder_of_folders(tmp_path: Path) -> None:
    from PIL import Image

    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for number in range(11):
            Image.new("RGB", (40, 30), (100 * label, 20 * number, 255)).save(tmp_path / name / f"{number:02}.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no class")
    data = PictureFolder(tmp_path, 16)
    assert data.classes == ("cat", "dog")
    pixels, label = data.item(0)
    assert pixels.shape == (3, 16, 16) and pixels[2].mean() == 1.0
    seen = {(label, round((pixels[1].mean().item() + 1) / 2 * 255)) for pixels, label in map(data.item, range(20))}
    assert seen == {(label, 20 * number) for label in range(2) for number in range(10)}  # each once in an epoch
    kept = {(label, round((pixels[1].mean().item() + 1) / 2 * 255)) for pixels, label in map(data.held_out, range(2))}
    assert kept == {(0, 200), (1, 200)}
    assert round((data.item(0)[0][0].mean().item() + 1) / 2 * 255) == 100 * data.item(0)[1]


@pytest.mark.parametrize(
    ("make", "words"), [("none", "no such folder"), ("one", "two classes"), ("few", "two or more of")]
)
def test_folders_that_are_no_data(tmp_path: Path, make: str, words: str) -> None:
    from PIL import Image

    if make != "none":
        for name in ("a", "b")[: 1 if make == "one" else 2]:
            (tmp_path / "data" / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "1.png")
    with pytest.raises(ValueError, match=words):
        PictureFolder(tmp_path / "data")


def test_a_canvas_that_is_too_small() -> None:
    with pytest.raises(ValueError, match="size=8"):
        DigitPictures(8)
