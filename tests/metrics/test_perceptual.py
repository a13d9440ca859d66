"""LPIPS around its network: what the network is given, that frames are frames, and why there may be none."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from attn_plugins.metrics.perceptual import SMALLEST, Perceptual, why_not


class Network(torch.nn.Module):
    """Stands in for the package's: the mean absolute difference, and a look at what came."""

    def forward(self, a, b):
        assert a.shape[1] == 3 and min(a.shape[-2:]) >= SMALLEST and a.min() >= -1 and a.max() <= 1
        return (a - b).abs().mean((1, 2, 3), keepdim=True)


def test_every_picture_gets_its_number():
    a, b = torch.rand(2, 9, 1, 16, 20), torch.rand(2, 9, 1, 16, 20)
    found = Perceptual(Network())(a, b)
    torch.testing.assert_close(found, 2 * (a - b).abs().mean((-3, -2, -1)))
    assert torch.equal(Perceptual(Network())(a, a), torch.zeros(2, 9))
    large = torch.rand(3, 70, 80)
    assert Perceptual(Network())(large, 1 - large).shape == ()


def test_refusals():
    with pytest.raises(ValueError, match="two equal shapes"):
        Perceptual(Network())(torch.rand(3, 64, 64), torch.rand(3, 64, 65))


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install lpips" in why_not()
    with pytest.raises(ImportError, match="pip install lpips"):
        Perceptual()
