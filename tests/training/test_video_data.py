"""Videos by number: repeatable, shared out over processes, and errors that say what is wrong with a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attn_plugins.training.video_batches import held_out_item, training_batch
from attn_plugins.training.video_data import EMPTY, LatentFolder, MovingDigits
from tests.support.tiny import randn

save_file = pytest.importorskip("safetensors.torch").save_file


def folder_of(folder: Path, videos: int) -> Path:
    for number in range(videos):
        parts = {"latents": torch.full((4, 2, 4, 4), float(number)), "prompt_embeds": randn(3, 8, seed=number)}
        save_file(parts, folder / f"{number:03}.safetensors")
    return folder


def test_digits_by_number() -> None:
    pytest.importorskip("sklearn")
    data = MovingDigits(frames=2, size=24)
    video, prompt = data.item(7)
    assert video.shape == (1, 2, 24, 24) and prompt.shape == (2, 16)
    assert torch.equal(video, data.item(7)[0]) and not torch.equal(video, data.item(8)[0])
    assert not torch.equal(video, MovingDigits(frames=2, size=24, seed=1).item(7)[0])
    assert not torch.equal(video, data.held_out(7)[0])
    with pytest.raises(ValueError, match="size=25"):
        MovingDigits(size=25)
    with pytest.raises(ValueError, match="frames=0"):
        MovingDigits(frames=0)


def test_a_folder_gives_every_file_once_before_any_again(tmp_path: Path) -> None:
    data = LatentFolder(folder_of(tmp_path, 20))
    seen = [int(data.item(number)[0][0, 0, 0, 0]) for number in range(36)]
    assert sorted(seen[:18]) == sorted(seen[18:]) == list(range(18)) and seen[:18] != seen[18:]
    assert [int(data.held_out(number)[0][0, 0, 0, 0]) for number in range(3)] == [18, 19, 18]
    assert seen == [int(LatentFolder(tmp_path).item(number)[0][0, 0, 0, 0]) for number in range(36)]
    assert data.empty() is None
    save_file({"prompt_embeds": torch.ones(3, 8)}, tmp_path / EMPTY)
    empty = LatentFolder(tmp_path).empty()
    assert empty is not None and empty.sum() == 24


def test_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        LatentFolder(tmp_path / "none")
    with pytest.raises(ValueError, match="0 videos; give 2 or more"):
        LatentFolder(tmp_path)
    folder_of(tmp_path, 2)
    save_file({"latents": torch.zeros(4, 3, 4, 4), "prompt_embeds": torch.zeros(3, 8)}, tmp_path / "1.safetensors")
    with pytest.raises(ValueError, match=r"1.safetensors: .*one size a folder"):
        LatentFolder(tmp_path)
    save_file({"video": torch.zeros(2)}, tmp_path / "1.safetensors")
    with pytest.raises(ValueError, match=r"1.safetensors: has .*video.*give `latents`"):
        LatentFolder(tmp_path)


def test_two_processes_have_the_batch_of_one(tmp_path: Path) -> None:
    data = LatentFolder(folder_of(tmp_path, 20))
    whole = training_batch(data, 3, 4, shift=3.0)
    parts = [training_batch(data, 3, 2, shift=3.0, rank=rank, processes=2) for rank in range(2)]
    for name in ("latents", "prompts", "levels", "noise"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert not torch.equal(whole.noise, training_batch(data, 4, 4, shift=3.0).noise)
    assert not torch.equal(whole.noise, training_batch(data, 3, 4, shift=3.0, seed=1).noise)


def test_levels_are_stratified_and_prompts_dropped_at_their_rate(tmp_path: Path) -> None:
    save_file({"prompt_embeds": torch.zeros(3, 8)}, tmp_path / EMPTY)
    data = LatentFolder(folder_of(tmp_path, 20))
    for step in range(5):
        levels = training_batch(data, step, 4).levels.sort().values
        torch.testing.assert_close(levels.diff(), torch.full((3,), 0.25))
    dropped = [training_batch(data, step, 10, drop_prompt=0.3).prompts.abs().sum((1, 2)) == 0 for step in range(40)]
    assert 0.22 < torch.cat(dropped).float().mean() < 0.38
    assert (training_batch(data, 0, 10).prompts.abs().sum((1, 2)) > 0).all()
    ladder = [held_out_item(data, number, 4).levels.item() for number in range(4)]
    assert ladder == [0.125, 0.375, 0.625, 0.875]
