"""Who was put where: the maps of the weights, and the layer's own weights behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.methods.mip import ReferenceMaps
from attn_plugins.sequence import Sequence
from tests.patches.test_mip import MASKS, TWO, latents, pipeline
from tests.support.beside import SMALL
from tests.support.ip_adapters import embeds

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def test_they_are_the_masks_where_masks_say_it_all() -> None:
    pipe, images = pipeline("sdxl"), embeds(1, 2)
    handle = attn_plugins.patch(pipe, "mip", **TWO)
    plain = latents(pipe, "sdxl", images)
    with ReferenceMaps(handle) as maps:
        assert torch.equal(latents(pipe, "sdxl", images), plain)
    shares = maps.mean()
    assert maps.phrases == ("cat", "a big dog")
    assert shares.shape == (2, 2, 8, 8)  # without and with the prompt; the finest level with attention
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 8, 8))
    assert (shares[1, 0] - 0.5).abs().max() > 0.002
    with ReferenceMaps(handle) as maps:
        latents(pipe, "sdxl", images, cross_attention_kwargs={"ip_adapter_masks": MASKS})
    sharp = maps.mean((8, 8))[1, 0]
    assert (sharp[:, :3] > 0.99).all() and (sharp[:, 5:] < 0.01).all()
    assert all(layer.watch is None for layer in handle.patches[0].layers)


def test_they_are_means_over_layers_and_steps_of_any_size() -> None:
    pipe = pipeline("sd15")
    maps = ReferenceMaps(attn_plugins.patch(pipe, "mip", **TWO))
    for value, side in ((0.2, 2), (0.4, 2), (0.6, 4)):
        first = torch.full((1, 1, side * side), value)
        maps.take(torch.cat([first, 1 - first], 1), Sequence((side, side)))
    maps.take(torch.ones(1, 2, 3), None)  # outside a level: no grid, no map
    torch.testing.assert_close(maps.mean()[0, 0], torch.full((4, 4), 0.4))
    assert maps.mean((3, 5)).shape == (1, 2, 3, 5)
    with pytest.raises(ValueError, match="the batch changed from 1 to 2"):
        maps.take(torch.ones(2, 2, 4), Sequence((2, 2)))


def test_what_cannot_be_mapped() -> None:
    pipe: Any = pipeline("sd15")
    handle = attn_plugins.patch(pipe, "mip", **TWO)
    with pytest.raises(ValueError, match="no reference was merged inside the block"):
        ReferenceMaps(handle).mean()
    with ReferenceMaps(handle), pytest.raises(ValueError, match="are being collected already"):
        ReferenceMaps(handle).__enter__()
    with pytest.raises(ValueError, match="maps are of patches by 'mip', not 'gna'"):
        ReferenceMaps(attn_plugins.patch(pipe, "gna", **SMALL))
