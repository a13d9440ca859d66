"""`text_to_weight` as a weight of the layers: trained, saved, loaded, and gone after `unpatch`; the adapter's file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.methods.mip import (
    ReferenceMaps,
    Strengths,
    make_adapter_trainable,
    read_adapter,
    read_text_weights,
    save_adapter,
    write_adapter,
)
from tests.patches.test_mip import NAMES, TWO, differs, latents, pipeline
from tests.support.ip_adapters import checkpoint, embeds, write
from tests.support.snapshot import snapshot
from tests.support.tiny_pipelines import build

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def step(pipe: Any, name: str, images: torch.Tensor) -> torch.Tensor:
    """A forward of the UNet with gradients."""
    unet = pipe.unet
    noise = torch.randn(2, unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 8, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    more = {"text_embeds": torch.ones(2, 32), "time_ids": torch.zeros(2, 6)} if name == "sdxl" else {}
    return unet(noise, 3, text, added_cond_kwargs={"image_embeds": [images], **more}, return_dict=False)[0]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained(name: str, tmp_path: Path) -> None:
    pipe, images = pipeline(name), embeds(1, 2)
    with attn_plugins.patched(pipe, "mip", **TWO):
        free = latents(pipe, name, images)
    before, names = snapshot(pipe.unet), list(pipe.unet.state_dict())
    handle = attn_plugins.patch(pipe, "mip", train=True, **TWO)
    assert torch.equal(latents(pipe, name, images), free)  # zeros change nothing
    learned = make_adapter_trainable(handle)
    layers = handle.patches[0].layers
    assert len(learned) == 3 * len(layers) and {id(p) for p in learned} == {
        id(p) for p in pipe.unet.parameters() if p.requires_grad
    }
    state = pipe.unet.state_dict()
    named = dict(handle.named_weights())
    assert list(named) == [f"{layer.name}.mip.text_to_weight" for layer in layers] and named.keys() <= state.keys()
    step(pipe, name, images).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in learned)
    assert all(p.grad is None for p in pipe.unet.parameters() if not p.requires_grad)
    with torch.no_grad():
        for p in learned:
            p -= 0.5 * p.grad / p.grad.abs().max()  # type: ignore[operator]
            p.grad = None
    tuned = latents(pipe, name, images)
    assert differs(tuned, free)
    # saved and loaded by the handle, as the weights of other methods
    folder, kept = handle.save_weights(tmp_path / "weights"), {name: p.detach().clone() for name, p in named.items()}
    with torch.no_grad():
        for p in named.values():
            p.zero_()
    handle.load_weights(folder)
    assert all(torch.equal(p, kept[name]) for name, p in handle.named_weights())
    # the adapter's file: loaded by diffusers, with and without us
    source = write(checkpoint(pipe.unet), tmp_path / "base.bin")
    for ending in ("safetensors", "bin"):
        file = save_adapter(handle, source, tmp_path / f"mip.{ending}")
        other = build(name)
        other.load_ip_adapter(str(tmp_path), subfolder="", weight_name=file.name, image_encoder_folder=None)
        other.set_ip_adapter_scale(0.8)
        with attn_plugins.patched(other, "mip", checkpoint=str(file), **TWO):
            assert torch.equal(latents(other, name, images), tuned)
        with attn_plugins.patched(other, "mip", checkpoint=str(file), train=True, **TWO):  # to train it further
            assert torch.equal(latents(other, name, images), tuned)
    handle.remove()
    assert list(pipe.unet.state_dict()) == names and snapshot(pipe.unet) == before


def test_a_copy_has_weights_of_its_own() -> None:
    pipe = pipeline("sd15")
    handle = attn_plugins.patch(pipe, "mip", train=True, **TWO)
    unet = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        for _, p in handle.named_weights():
            p.fill_(1.0)
    copies = [p for name, p in unet.named_parameters() if "text_to_weight" in name]
    assert copies and not any(bool(p.any()) for p in copies)
    attn_plugins.unpatch(unet)
    assert not any("text_to_weight" in name for name in unet.state_dict())
    assert handle.active and any("text_to_weight" in name for name in pipe.unet.state_dict())


def test_in_half_precision_what_is_trained_is_not() -> None:
    pipe = pipeline("sd15")
    pipe.unet.half()
    handle = attn_plugins.patch(pipe, "mip", train=True, **TWO)
    assert all(p.dtype == torch.float32 for p in make_adapter_trainable(handle))
    assert pipe.unet.conv_in.weight.dtype == torch.float16


def test_where_references_are_put() -> None:
    pipe, images = pipeline("sd15"), embeds(1, 2)
    handle = attn_plugins.patch(pipe, "mip", train=True, **TWO)
    learned = make_adapter_trainable(handle)
    with Strengths(handle) as strengths, pytest.raises(ValueError, match="being collected already"), Strengths(handle):
        pass
    with Strengths(handle) as strengths:
        step(pipe, "sd15", images)
    with ReferenceMaps(handle) as maps:
        step(pipe, "sd15", images)
    assert len(strengths.maps) == len(handle.patches[0].layers)
    assert all(one.shape[:2] == (2, 2) for one in strengths.maps)
    # at zeros t is 1: what is taken is w
    size = tuple(maps.mean().shape[2:])
    same = [torch.nn.functional.interpolate(one, size=size, mode="bilinear", antialias=True) for one in strengths.maps]
    torch.testing.assert_close(torch.stack(same).mean(0), maps.mean())
    sum((one * torch.arange(one.shape[-1])).sum() for one in strengths.maps).backward()
    gates = [p for p in learned if p.shape[0] == 1]
    assert all(bool(p.grad.any()) for p in gates)  # type: ignore[union-attr]
    assert all(layer.watch is None for layer in handle.patches[0].layers)


def test_errors(tmp_path: Path) -> None:
    pipe = pipeline("sd15", "base", "base", scale=[0.8, 0.8])
    with pytest.raises(ValueError, match="with 2 IP-Adapters: one is trained at a time"):
        attn_plugins.patch(pipe, "mip", train=True, **TWO)
    pipe = pipeline("sd15")
    with attn_plugins.patched(pipe, "mip", **TWO) as handle, pytest.raises(ValueError, match="patch with train=True"):
        make_adapter_trainable(handle)
    part = attn_plugins.patched(pipe, "mip", train=True, layers=[0], **TWO)
    with part as handle, pytest.raises(ValueError, match="trained in all of its layers"):
        make_adapter_trainable(handle)
    with pytest.raises(ValueError, match="train=1: give true or false"):
        attn_plugins.patch(pipe, "mip", train=1, **TWO)
    with pytest.raises(ValueError, match="ends in .safetensors or .bin"):
        write_adapter(tmp_path / "mip.pt", {})
    torch.save({"ip_adapter": {"1.to_k_ip.weight": torch.ones(1)}}, tmp_path / "half.bin")
    with pytest.raises(ValueError, match="has no 'image_proj'"):
        read_adapter(tmp_path / "half.bin")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_adapter(tmp_path / "none.bin")


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_a_file_gives_back_what_was_written(ending: str, tmp_path: Path) -> None:
    state = checkpoint(build("sd15").unet, text_weights=True)
    found = read_adapter(write_adapter(tmp_path / f"file.{ending}", state))
    assert found.keys() == state.keys()
    for part in state:
        assert found[part].keys() == state[part].keys()
        assert all(torch.equal(found[part][name], t) for name, t in state[part].items())
    widths = [t.shape[1] for name, t in state["ip_adapter"].items() if "text_to_weight" in name]
    assert len(read_text_weights(tmp_path / f"file.{ending}", widths)) == len(widths)
