"""The tokens are where the readers say: touch one patch or one word of the input, and see which keys change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.method import AttentionCall
from tests.support import tiny_controlnets, tiny_image_models, tiny_packed_image_models
from tests.support.tiny import TinyModel, forward
from tests.support.windowed import Recording, Windowed

pytestmark = pytest.mark.usefixtures("quiet_diffusers")

PACKED = {**tiny_packed_image_models.MODELS, "joy_image_plus": tiny_image_models.MODELS["joy_image_plus"]}
PACKED |= {name: tiny_controlnets.MODELS[name] for name in ("flux_controlnet", "qwen_image_controlnet")}
MODELS: dict[str, TinyModel] = {**tiny_image_models.MODELS, **PACKED}
MODELS = {name: tiny for name, tiny in MODELS.items() if name != "sana"}  # no self-attention to be asked
# layers before the first joint attention have mixed the picture's tokens with each other
MIXED = {"flux3", "z_image", "lumina2", "bria_fibo2"}
CELL = (2, 4)


def first_call(tiny: TinyModel, inputs: dict[str, Any]) -> AttentionCall:
    """The first call that a method gets, of joint attention where there is some."""
    model = tiny.build()
    calls: list[Any] = []
    handle = attn_plugins.patch(model, Windowed(), size=0)
    for layer in handle.patches[0].layers:
        layer.processor = recording = Recording(layer.processor)
        recording.calls = calls
    forward(model, inputs)
    found = [call for call, _ in calls]
    return next((call for call in found if call.kind == "joint"), found[0])


def changed(one: AttentionCall, two: AttentionCall) -> set[int]:
    """The tokens of the first item whose keys differ."""
    assert one.sequence == two.sequence
    return set((one.k != two.k)[0].any(dim=-1).any(dim=0).nonzero().flatten().tolist())


def touch_picture(name: str, inputs: dict[str, Any], grid: tuple[int, ...]) -> None:
    """Change what one cell of the picture of the first item is made from."""
    row, column = CELL
    latents = inputs["x"][0] if "x" in inputs else inputs["hidden_states"][0]
    if name in PACKED:
        before = 8 if name == "ideogram4" else 0  # it gets text and picture in one
        latents[before + row * grid[1] + column] += 1
        return
    if name == "joy_image":
        latents = latents[-1]  # the last is made, the others are references
    high, wide = latents.shape[-2] // grid[0], latents.shape[-1] // grid[1]
    latents[..., row * high : (row + 1) * high, column * wide : (column + 1) * wide] += 1


def touch_text(inputs: dict[str, Any]) -> bool:
    for name in ("text_bth", "cap_feats", "encoder_hidden_states_t5", "encoder_hidden_states"):
        if name in inputs:
            inputs[name][0][(0,) * (inputs[name][0].ndim - 1)] += 1
            return True
    return False


@pytest.mark.parametrize("name", MODELS)
def test_a_patch_of_the_picture_is_its_cell_of_the_grid(name: str) -> None:
    tiny = MODELS[name]
    inputs = tiny.inputs(2, 0)
    touched = tiny.inputs(2, 0)
    touch_picture(name, touched, tiny.grids[0])
    for given in (inputs, touched):
        if "controlnet_cond" in given:
            given["controlnet_cond"] = torch.zeros_like(given["controlnet_cond"])
    one, two = first_call(tiny, inputs), first_call(tiny, touched)
    assert one.sequence.grid == tiny.grids[0]
    start = one.sequence.text_before
    if name in MIXED:
        filling = 2 if name == "z_image" else 0  # up to 32 tokens, refined with the picture
        assert changed(one, two) == set(range(start, start + math.prod(tiny.grids[0]) + filling))
    else:
        assert changed(one, two) == {start + CELL[0] * tiny.grids[0][1] + CELL[1]}


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in ("pixart", "dit", "hunyuan_dit", "lumina_next")]
)
def test_a_word_of_the_prompt_is_beside_the_grid(name: str) -> None:
    tiny = MODELS[name]
    inputs, touched = tiny.inputs(2, 0), tiny.inputs(2, 0)
    assert touch_text(touched)
    for given in (inputs, touched):
        if "controlnet_cond" in given:
            given["controlnet_cond"] = torch.zeros_like(given["controlnet_cond"])
    one, two = first_call(tiny, inputs), first_call(tiny, touched)
    sequence = one.sequence.item(0)
    text = {
        index
        for segment in sequence.segments
        if segment.kind == "text"
        for index in range(segment.start, segment.start + segment.length)
    }
    found = changed(one, two)
    assert found and found <= text
