"""Queries and keys from before norm and rotation: what an interception tells of them is what the layers do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.method import AttentionCall, Method, Processor
from attn_plugins.ops.agent import agent_centres, pool_tokens
from attn_plugins.patches import interception
from attn_plugins.patches.plain_tokens import PlainTokens, Rotation
from tests.support.matrix import ON_GRID
from tests.support.tiny import randn
from tests.support.tiny_models import MODELS, forward, sd3
from tests.support.windowed import Windowed

pytestmark = pytest.mark.usefixtures("quiet_diffusers")

# no norm and no rotation: what arrives is what was projected
NOTHING_TO_UNDO = {
    "amused", "animatediff", "ddpm", "deepfloyd_if", "dit", "i2vgen_xl", "kandinsky21", "kandinsky22", "kandinsky3",
    "latte", "pixart", "sd15", "sd3", "sd3_controlnet", "sd_controlnet", "sdxl", "stable_cascade", "svd",
    "text_to_video",
}  # fmt: skip
# pooled as they arrive, after norm and rotation
AS_THEY_ARRIVE = {
    "allegro", "anyflow", "ernie_image", "framepack", "helios", "hidream", "joy_image", "joy_image_plus", "kandinsky5",
    "kandinsky6", "ltx_video", "ltx2", "mochi", "prx",
}  # fmt: skip
# fewer heads of keys than of queries, repeated after norm and rotation: the queries alone are told
QUERIES_ALONE = {"dreamlite", "krea2", "lumina2", "lumina_next", "nucleus_image"}


class Looking(Processor):
    """Keeps the calls, and what their layers were given."""

    wants_plain = True
    wants_inputs = True

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call)
        return call.q


class Look(Windowed):
    name = "look"

    def __init__(self) -> None:
        self.looking = Looking()

    def processor(self, *_: Any) -> Processor:
        return self.looking


def look(model: Any, inputs: dict[str, Any]) -> list[AttentionCall]:
    method: Method = Look()
    with attn_plugins.patched(model, method, min_tokens=0, dense_steps=0):
        forward(model, inputs)
    return method.looking.calls  # type: ignore[attr-defined]


def inputs_of(family: str) -> dict[str, Any]:
    inputs = MODELS[family].inputs(2, 0)
    if family == "hunyuan_dit":  # a rotation, not any numbers
        angles = randn(30, 4).repeat_interleave(2, dim=1)
        inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
    return inputs


@pytest.mark.parametrize("family", ON_GRID)
def test_unpooled_they_are_what_the_attention_gets(family: str) -> None:
    calls = look(MODELS[family].build(), inputs_of(family))
    assert calls
    told = {"q": 0, "k": 0}
    for call in calls:
        sequence = call.sequence
        rows = slice(sequence.text_before, sequence.text_before + sequence.tokens)
        for which in told:
            found = call.plain.pooled(which, call, sequence.grid) if call.plain is not None else None
            if found is not None:
                told[which] += 1
                arrived = getattr(call, which)
                torch.testing.assert_close(found, arrived[:, :, rows], atol=2e-6, rtol=1e-5)
    quiet = family in NOTHING_TO_UNDO | AS_THEY_ARRIVE
    assert told["q"] == (0 if quiet else len(calls))
    assert told["k"] == (0 if quiet or family in QUERIES_ALONE else len(calls))


def interleaved(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate channels 2i and 2i + 1 of (..., n, D) by angles (n, D / 2), in complex numbers."""
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.view_as_real(turned).flatten(-2)


def angles_at(places: torch.Tensor, dims: tuple[int, ...], theta: float = 10000.0) -> torch.Tensor:
    """(n, D / 2): the angles of places (n, axes) where an axis turns `dims` channels."""
    rows = [
        places[:, axis, None].double() / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        for axis, dim in enumerate(dims)
    ]
    return torch.cat(rows, dim=1)


def heads_of(x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    return x.unflatten(-1, (call.q.shape[1], -1)).transpose(1, 2)


TO = (2, 3)  # of a grid of 5 x 6: cells of an odd number of rows, which overlap, and of an even number of columns


def test_flux_pools_before_norm_and_rotation() -> None:
    """q = rotate(norm(to_q(x)), place): agents are rotate(norm(to_q(mean x)), mean place), in both kinds of blocks."""
    model = MODELS["flux"].build()
    blocks = [model.transformer_blocks[0].attn, model.single_transformer_blocks[0].attn]
    calls = look(model, MODELS["flux"].inputs(2, 0))
    places = torch.cat([torch.zeros(6, 1), agent_centres((5, 6), TO)], dim=1)
    for call, attn in zip(calls, blocks, strict=True):
        hidden = call.extras["args"][0][:, -30:]
        with torch.no_grad():
            means = attn.norm_q(heads_of(attn.to_q(pool_tokens(hidden, (5, 6), TO)), call))
        want = interleaved(means, angles_at(places, tuple(model.config.axes_dims_rope)))
        torch.testing.assert_close(call.plain.pooled("q", call, TO).double(), want, atol=2e-6, rtol=1e-5)
        late = pool_tokens(call.q, (5, 6), TO, before=call.sequence.text_before)
        assert not torch.allclose(late.double(), want, atol=1e-2)


def test_wan_norms_over_all_heads_and_turns_three_axes() -> None:
    model = MODELS["wan"].build()
    calls = look(model, MODELS["wan"].inputs(2, 0))
    grid, to = (3, 3, 4), (2, 1, 2)
    dim = calls[0].q.shape[-1]
    space = 2 * (dim // 6)
    for call, block in zip(calls, model.blocks, strict=True):
        attn = block.attn1
        with torch.no_grad():
            means = heads_of(attn.norm_q(attn.to_q(pool_tokens(call.extras["args"][0], grid, to))), call)
        want = interleaved(means, angles_at(agent_centres(grid, to), (dim - 2 * space, space, space)))
        torch.testing.assert_close(call.plain.pooled("q", call, to).double(), want, atol=2e-6, rtol=1e-5)


def test_sd35_norms_its_means() -> None:
    """SD 3.5 norms queries and rotates nothing; the attention of the picture alone beside the joint one is told too."""
    from diffusers import SD3Transformer2DModel

    config = {key: value for key, value in sd3().config.items() if not key.startswith("_")}
    model = SD3Transformer2DModel(**{**config, "qk_norm": "rms_norm"}).eval()
    calls = look(model, MODELS["sd3"].inputs(2, 0))
    modules = [
        module
        for name, module in model.named_modules()
        if name.endswith((".attn", ".attn2")) and hasattr(module, "to_q")
    ]
    assert len(calls) == len(modules)
    for call, attn in zip(calls, modules, strict=True):
        with torch.no_grad():
            want = attn.norm_q(heads_of(attn.to_q(pool_tokens(call.extras["args"][0], (5, 6), TO)), call))
        torch.testing.assert_close(call.plain.pooled("q", call, TO), want, atol=2e-6, rtol=1e-5)


def test_a_part_of_the_tokens_is_not_pooled() -> None:
    """Under context parallelism a device holds a part of what enters the norm: the call stays dense and says so."""
    model = MODELS["flux"].build()
    handle = attn_plugins.patch(model, Look(), min_tokens=0)
    layer, q = handle.patches[0].layers[0], randn(1, 15, 2, 8)
    layer.wants_inputs = False  # which would refuse first
    running = interception._running
    running.layer, running.plain = layer, PlainTokens(Rotation("none", "", -1), None, {"q": (torch.nn.Identity(), q)})
    try:
        with pytest.warns(UserWarning, match="pools what enters the layer"):
            assert interception._attend_together(layer, q, q, q, None, 0.0, False, None, None) is None
    finally:
        running.layer = running.plain = None


def test_nothing_stays_on_the_norms() -> None:
    model = MODELS["flux"].build()
    handle = attn_plugins.patch(model, Look(), min_tokens=0)
    norm = model.transformer_blocks[0].attn.norm_q
    assert norm._forward_pre_hooks
    handle.remove()
    assert not norm._forward_pre_hooks
    with attn_plugins.patched(model, Windowed()):
        assert not norm._forward_pre_hooks  # nor is anything caught for methods that do not ask
