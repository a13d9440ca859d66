"""Parts of photographs: the same by number, of cells that are held out or are not, with nothing but what they show."""

from __future__ import annotations

import pytest
import torch

from attn_plugins.training import photographs
from attn_plugins.training.photographs import CELLS, KEPT, PhotographParts

pytest.importorskip("skimage")
pytest.importorskip("sklearn")


def test_a_part_depends_on_its_number_alone() -> None:
    data = PhotographParts(32)
    pixels, label = data.item(5)
    again = PhotographParts(32).item(5)
    assert torch.equal(pixels, again[0]) and label == again[1] and pixels.shape == (3, 32, 32)
    assert not torch.equal(pixels, data.item(6)[0]) and not torch.equal(pixels, data.held_out(5)[0])
    assert not torch.equal(pixels, PhotographParts(32, seed=1).item(5)[0])
    assert pixels.mean().abs() < 1e-5 and pixels.std() == pytest.approx(1, abs=0.01)  # no brightness, no contrast
    assert {data.item(number)[1] for number in range(200)} == set(range(len(data.classes))) == set(range(10))


def test_what_is_held_out_is_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs whose pixels are the number of their cell, shaded so that each part has a contrast."""
    cells = torch.arange(CELLS * CELLS).view(CELLS, CELLS).repeat_interleave(20, 0).repeat_interleave(20, 1)
    monkeypatch.setattr(photographs, "photographs", lambda: (cells.float(),) * 10)
    seen: dict[str, set[int]] = {"train": set(), "test": set()}

    def caught(part: torch.Tensor, **options: object) -> torch.Tensor:
        seen[split] |= set(part.unique().int().tolist())
        return torch.zeros(1, 1, 16, 16)

    monkeypatch.setattr(photographs.F, "interpolate", caught)
    data = PhotographParts(16)
    for split, item in (("train", data.item), ("test", data.held_out)):  # noqa: B007  # read by `caught`
        for number in range(400):
            item(number)
    assert seen["test"] == {row * CELLS + column for row, column in enumerate(KEPT)}
    assert seen["train"] == set(range(CELLS * CELLS)) - seen["test"]


def test_a_size_too_small_is_an_error() -> None:
    with pytest.raises(ValueError, match="size=8: give pictures of 16 px or more"):
        PhotographParts(8)
