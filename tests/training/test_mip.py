"""What MIP's training draws: drops, noise and levels by number, and what is to be predicted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from attn_plugins.training.mip import Drops, denoising_target, held_out_batch, training_batch
from attn_plugins.training.two_objects import DrawnObjects

DATA = DrawnObjects()


def test_shares_of_what_is_dropped() -> None:
    image, text = Drops(0.1, 0.2, 0.3).of(range(2000), seed=0)
    both = image & text
    shares = [float(t.float().mean()) for t in (image & ~both, text & ~both, both)]
    assert shares == pytest.approx([0.1, 0.2, 0.3], abs=0.03)
    again = Drops(0.1, 0.2, 0.3).of([7, 11], seed=0)
    assert torch.equal(again[0], image[[7, 11]]) and torch.equal(again[1], text[[7, 11]])
    assert not any(bool(t.any()) for t in Drops(0, 0, 0).of(range(100), seed=0))
    with pytest.raises(ValueError, match="give three shares"):
        Drops(0.5, 0.5, 0.1)


def test_two_processes_do_what_one_does() -> None:
    whole = training_batch(DATA, 3, 4, seed=1)
    parts = [training_batch(DATA, 3, 2, seed=1, rank=rank, processes=2) for rank in range(2)]
    assert whole.numbers == parts[0].numbers + parts[1].numbers == [12, 13, 14, 15]
    assert torch.equal(whole.levels, torch.cat([part.levels for part in parts]))
    shape = (4, 3, 2, 2)
    assert torch.equal(whole.noise(shape), torch.cat([part.noise(shape) for part in parts]))
    times = whole.times(1000)
    assert times.dtype == torch.int64 and (times.sort().values.diff() == 250).all()  # even over the batch
    held = held_out_batch(DATA, range(4), 8)
    assert len(set(held.levels.tolist())) == 4 and torch.equal(held.items[2].picture, DATA.held_out(2).picture)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_what_is_to_be_predicted(kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    latents, noise = torch.randn(2, 2, 3, 1, 1, generator=torch.Generator().manual_seed(0)).unbind()
    times = torch.tensor([10, 700])
    if kind == "flow":
        with pytest.raises(ValueError, match="predicts 'flow': known are epsilon"):
            denoising_target(SimpleNamespace(config=SimpleNamespace(prediction_type=kind)), latents, noise, times)
        return
    scheduler = diffusers.DDPMScheduler(prediction_type=kind, clip_sample=False)
    target = denoising_target(scheduler, latents, noise, times)
    # a model that predicts it gets the picture back
    for index, time in enumerate(times):
        noisy = scheduler.add_noise(latents, noise, times)[index : index + 1]
        found = scheduler.step(target[index : index + 1], time, noisy).pred_original_sample
        torch.testing.assert_close(found, latents[index : index + 1], atol=1e-4, rtol=1e-4)
