"""The pictures of a comparison: their layout, and that pixels arrive unchanged."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attn_plugins.pipelines.comparing.pictures import COLUMNS, GAP, LABEL, write

Image = pytest.importorskip("PIL.Image")


def comparison(batch: int, frames: int, channels: int, size: int = 16, seeds: int = 1) -> SimpleNamespace:
    """What `write` reads of a comparison, with noise for frames: (B, F, C, H, W) in 0..1."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, frames, channels, size, size)
    pairs = [(torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)) for _ in range(seeds)]
    return SimpleNamespace(frames=tuple(pairs), method="gna")


def pixels(video: torch.Tensor) -> np.ndarray:
    """One frame (C, H, W) as it should stand in the picture, enlarged eightfold: 16 px to 128."""
    image = (video.expand(3, -1, -1).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    return image.repeat(8, axis=0).repeat(8, axis=1)


def test_videos_stand_dense_above_patched(tmp_path):
    found = comparison(batch=2, frames=12, channels=1)
    sheet, animation = write(found, tmp_path / "new" / "folder", "name")
    image = np.asarray(Image.open(sheet))
    assert image.shape == (4 * (128 + LABEL + GAP) - GAP, COLUMNS * (128 + GAP) - GAP, 3)
    dense, patched = found.frames[0]
    for row, video in enumerate((dense[0], patched[0], dense[1], patched[1])):
        top = row * (128 + LABEL + GAP) + LABEL
        assert np.array_equal(image[top : top + 128, :128], pixels(video[0]))
        assert np.array_equal(image[top : top + 128, -128:], pixels(video[-1]))
    with Image.open(animation) as opened:
        assert opened.n_frames == 12 and opened.size == (2 * 128 + GAP, 2 * 128 + GAP)


def test_single_pictures_stand_beside_each_other(tmp_path):
    found = comparison(batch=1, frames=1, channels=3, seeds=2)
    (sheet,) = write(found, tmp_path, "name")
    image = np.asarray(Image.open(sheet))
    assert image.shape == (2 * (128 + LABEL + GAP) - GAP, 2 * 128 + GAP, 3)
    assert np.array_equal(image[LABEL : LABEL + 128, -128:], pixels(found.frames[0][1][0, 0]))


def test_large_frames_keep_their_size(tmp_path):
    (sheet,) = write(comparison(batch=1, frames=1, channels=3, size=200), tmp_path, "name")
    assert Image.open(sheet).size == (2 * 200 + GAP, 200 + LABEL)


def test_nothing_is_written_without_frames(tmp_path):
    assert write(SimpleNamespace(frames=(), method="gna"), tmp_path / "empty", "name") == []
    assert not (tmp_path / "empty").exists()
