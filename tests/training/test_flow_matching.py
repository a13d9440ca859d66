"""The loss and the noise levels, against what they are by definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attn_plugins.training.flow_matching import flow_loss, shifted
from tests.support.tiny import randn


class Known(nn.Module):
    """Answers as diffusers' Wan does, with a given flow, and keeps what it was asked."""

    def __init__(self, flow: torch.Tensor) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):  # type: ignore[no-untyped-def]
        self.seen = hidden_states, timestep, encoder_hidden_states
        return (self.flow,)


def test_the_right_velocity_has_no_loss_and_is_asked_at_the_noisy_video() -> None:
    video, noise, prompts = randn(2, 3, 4, 4, 4, seed=0), randn(2, 3, 4, 4, 4, seed=1), randn(2, 5, 8, seed=2)
    levels = torch.tensor([0.25, 0.75])
    model = Known(noise - video)
    assert torch.equal(flow_loss(model, video, prompts, levels, noise), torch.zeros(2))
    noisy, times, asked = model.seen
    torch.testing.assert_close(noisy[0], 0.75 * video[0] + 0.25 * noise[0])
    torch.testing.assert_close(noisy[1], 0.25 * video[1] + 0.75 * noise[1])
    assert times.tolist() == [250.0, 750.0] and torch.equal(asked, prompts)


def test_the_loss_is_per_video() -> None:
    video, noise = randn(2, 1, 2, 2, 2, seed=0), randn(2, 1, 2, 2, 2, seed=1)
    flow = noise - video
    flow[1] += 2.0
    losses = flow_loss(Known(flow), video, randn(2, 1, 1), torch.tensor([0.5, 0.5]), noise)
    torch.testing.assert_close(losses, torch.tensor([0.0, 4.0]))


def test_levels_are_shifted_as_the_scheduler_does_it() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    torch.testing.assert_close(shifted(plain.sigmas, 3.0), scheduler.sigmas)
    with pytest.raises(ValueError, match="shift=0"):
        shifted(plain.sigmas, 0)
