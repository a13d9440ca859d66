"""Every layer of a patched UNet is the paper's layer, in float64: from what enters the module to what leaves it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_plugins
from tests.patches.test_mip import NAMES
from tests.support.ip_adapters import checkpoint, embeds, write
from tests.support.tiny_pipelines import build

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def paper_layer(
    attn: Any, x: torch.Tensor, text: torch.Tensor, images: list[torch.Tensor], phrases: list[torch.Tensor],
    text_to_weight: torch.Tensor, scale: float,
) -> torch.Tensor:  # fmt: skip
    """images: (B, tokens, C) an object; phrases: (n, C) an object, without the begin token."""

    def heads(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(-1, (attn.heads, -1)).transpose(-2, -3)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v
        return out.transpose(1, 2).flatten(2)

    q = heads(attn.to_q(x))
    z_text = attend(q, heads(attn.to_k(text)), heads(attn.to_v(text)))
    adapter = attn.processor
    z = [attend(q, heads(adapter.to_k_ip[0](c)), heads(adapter.to_v_ip[0](c))) for c in images]
    r = [
        torch.softmax(heads(attn.to_k(e)) @ q.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1).mean((1, 2))
        for e in phrases
    ]
    gate = torch.sigmoid(z_text @ text_to_weight)
    gate = gate / gate.mean(1, keepdim=True)
    merged = z_text + sum((gate * ri / sum(r) * scale)[..., None] * zi for ri, zi in zip(r, z, strict=True))
    return attn.to_out[0](merged)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["base", "plus", "full"])
def test_every_layer(name: str, kind: str, tmp_path: Any) -> None:
    pipe = build(name)
    state = checkpoint(pipe.unet, kind, text_weights=True)
    path = write(state, tmp_path / "mip.safetensors")
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=path.name, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.7)
    pipe.unet.double()
    names = ["cat", "a big dog", "hat"]
    handle = attn_plugins.patch(pipe, "mip", phrases=names, photos=[1, 2, 1], checkpoint=path)
    encoded = pipe.encode_prompt(
        prompt=names, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0].double()
    phrases = [encoded[i, 1 : 1 + len(pipe.tokenizer(one).input_ids) - 2] for i, one in enumerate(names)]
    calls: list[tuple[int, Any, Any, Any]] = []
    for number, layer in enumerate(handle.patches[0].layers):
        pipe.unet.get_submodule(layer.name).register_forward_hook(
            lambda attn, args, kwargs, out, number=number: calls.append((number, attn, (args, kwargs), out)),
            with_kwargs=True,
        )
    noise = torch.randn(1, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 8, pipe.unet.config.cross_attention_dim, dtype=torch.float64)
    more = {"text_embeds": torch.randn(2, 32).double(), "time_ids": torch.zeros(2, 6)} if name == "sdxl" else {}
    images = [embeds(1, 2, 3, 4, kind=kind).double()]
    with torch.no_grad():
        pipe.unet(noise.expand(2, -1, -1, -1), 3, text, added_cond_kwargs={"image_embeds": images, **more})
        assert len(calls) == len(handle.patches[0].layers)
        for number, attn, (args, kwargs), out in calls:
            tokens = kwargs["encoder_hidden_states"][1][0]
            objects = [tokens[:, 0], tokens[:, 1:3].mean(1), tokens[:, 3]]
            weight = state["ip_adapter"][f"{2 * number + 1}.text_to_weight.weight"][0].double()
            expected = paper_layer(attn, args[0], text, objects, phrases, weight, 0.7)
            torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
