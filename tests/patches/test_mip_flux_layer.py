"""Every double block's attention is MIP's layer on FLUX, in float64: from what enters the module to what leaves it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_plugins
from tests.support.flux_adapters import embeds, latents, pipeline

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")
NAMES = ["cat", "big dog", "mat"]
SCALES = (1.0, 0.5, 2.0)


def layer(
    attn: Any, x: torch.Tensor, text: torch.Tensor, rotary: Any, images: list[torch.Tensor], rows: list[list[int]],
    masks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """What is added for the images: images (B, tokens, C) and rows (tokens of the phrase) an object, masks (R, S)."""
    from diffusers.models.embeddings import apply_rotary_emb

    def heads(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(-1, (attn.heads, -1))

    words = text.shape[1]
    q, keys = attn.norm_q(heads(attn.to_q(x))), attn.norm_added_k(heads(attn.add_k_proj(text)))
    cos, sin = rotary
    turned = apply_rotary_emb(q, (cos[words:], sin[words:]), sequence_dim=1)
    keys = apply_rotary_emb(keys, (cos[:words], sin[:words]), sequence_dim=1)
    factor, adapter = q.shape[-1] ** -0.5, attn.processor
    out, relevances = 0.0, []
    for index, row in enumerate(rows):
        scores = torch.einsum("blhd,bshd->bhls", keys[:, row], turned) * factor
        mask = 1.0 if masks is None else masks[index]
        relevances.append(torch.softmax(scores, dim=-1).mean((1, 2)) * mask)
    for image, relevance, scale in zip(images, relevances, SCALES, strict=True):
        k, v = heads(adapter.to_k_ip[0](image)), heads(adapter.to_v_ip[0](image))
        z = torch.einsum("bhst,bthd->bshd", (torch.einsum("bshd,bthd->bhst", q, k) * factor).softmax(-1), v)
        out = out + (0.7 * scale * relevance / sum(relevances))[..., None] * z.flatten(2)
    return out


@pytest.mark.parametrize("masks", [False, True])
def test_every_double_block(masks: bool) -> None:
    pipe = pipeline(scale=0.7)
    pipe.transformer.double()
    pipe.text_encoder.double(), pipe.text_encoder_2.double()
    handle = attn_plugins.patch(pipe, "mip", phrases=NAMES, photos=[1, 2, 1], scales=list(SCALES))
    calls: list[tuple[Any, Any, Any, Any]] = []
    for one in handle.patches[0].layers:
        pipe.transformer.get_submodule(one.name).register_forward_hook(
            lambda attn, args, kwargs, out: calls.append((attn, args, kwargs, out)), with_kwargs=True
        )
    halves = torch.stack([torch.ones(8, 10), torch.arange(10).expand(8, -1) / 9, torch.full((8, 10), 0.5)])[None]
    more = {"joint_attention_kwargs": {"ip_adapter_masks": [halves]}} if masks else {}
    latents(pipe, embeds(1, 2, 3, 4).double(), steps=1, **more)
    assert len(calls) == 2
    pieces = [piece.replace("\u2581", "") for piece in pipe.tokenizer_2.tokenize("a cat and a big dog on a mat")]
    rows = {name: [] for name in NAMES}
    owners = [index for index, piece in enumerate(pieces) for _ in piece]
    for name in NAMES:
        start = "".join(pieces).index(name.replace(" ", ""))
        rows[name] = sorted(set(owners[start : start + len(name.replace(" ", ""))]))
    with torch.no_grad():
        for attn, _, kwargs, (_, _, found) in calls:
            tokens = kwargs["ip_hidden_states"][0]
            objects = [tokens[:, 0], tokens[:, 1:3].mean(1), tokens[:, 3]]
            x, text, rotary = (kwargs[n] for n in ("hidden_states", "encoder_hidden_states", "image_rotary_emb"))
            small = halves[0].flatten(1).double() if masks else None
            expected = layer(attn, x, text, rotary, objects, list(rows.values()), small)
            torch.testing.assert_close(found, expected, rtol=1e-5 if masks else 1e-9, atol=1e-9)
