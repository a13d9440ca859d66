"""Where the tokens of each video family are, found out by touching the model's inputs, not from what the reader says.

One place of the latents (or of the text, the history, a reference) is changed, and the keys of the first attention
layer are looked at: nothing has mixed tokens yet, so the keys that changed are the tokens that were made of it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.sequence import Sequence
from tests.support.tiny_models import MODELS, forward
from tests.support.windowed import Recording, Windowed

pytestmark = pytest.mark.usefixtures("quiet_diffusers")

# family: axes of hidden_states, pixels per token (time, height, width), frames that stand before the video
LATENTS = {
    "wan": ("BCTHW", (1, 2, 2), 0),
    "wan_vace": ("BCTHW", (1, 2, 2), 1),
    "wan_animate": ("BCTHW", (1, 2, 2), 1),
    "skyreels_v2": ("BCTHW", (1, 2, 2), 0),
    "chronoedit": ("BCTHW", (1, 2, 2), 0),
    "anyflow": ("BTCHW", (1, 2, 2), 0),
    "helios": ("BCTHW", (1, 2, 2), 0),
    "hunyuan_video": ("BCTHW", (1, 1, 1), 0),
    "hunyuan_video15": ("BCTHW", (1, 1, 1), 0),
    "framepack": ("BCTHW", (1, 2, 2), 0),
    "motif_video": ("BCTHW", (1, 1, 1), 0),
    "cogvideox": ("BTCHW", (1, 2, 2), 0),
    "consisid": ("BTCHW", (1, 2, 2), 0),
    "easyanimate": ("BCTHW", (1, 2, 2), 0),
    "mochi": ("BCTHW", (1, 2, 2), 0),
    "cosmos": ("BCTHW", (1, 2, 2), 0),
    "allegro": ("BCTHW", (1, 2, 2), 0),
    "kandinsky5": ("BTHWC", (1, 2, 2), 0),
    "kandinsky6": ("BTHWC", (1, 2, 2), 0),
}
# family: arguments whose tokens stand before, and after the video (Mochi's text is also pooled into all tokens: there
# the video's place tells the text's)
BESIDE = {
    "hunyuan_video": ((), ("encoder_hidden_states",)),
    "hunyuan_video15": ((), ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")),
    "framepack": (
        ("latents_history_4x", "latents_history_2x", "latents_clean"),
        ("encoder_hidden_states", "image_embeds"),
    ),
    "motif_video": ((), ("encoder_hidden_states", "image_embeds")),
    "cogvideox": (("encoder_hidden_states",), ()),
    "consisid": (("encoder_hidden_states",), ()),
    "easyanimate": (("encoder_hidden_states", "encoder_hidden_states_t5"), ()),
    "helios": (("latents_history_long", "latents_history_mid", "latents_history_short"), ()),
}
GRID = (3, 4, 4)
CELLS = [(0, 0, 0), (0, 0, 1), (0, 2, 0), (1, 0, 0), (2, 3, 3), (1, 2, 3)]


def first_call(model: Any, inputs: dict[str, Any]) -> Any:
    """The first patched layer's call, of the first item."""
    handle = attn_plugins.patch(model, Windowed(), min_tokens=0)
    layer = handle.patches[0].layers[0]
    layer.processor = recording = Recording(layer.processor)
    forward(model, inputs)
    handle.remove()
    return recording.calls[0][0]


def changed(before: Any, after: Any) -> list[int]:
    """The tokens whose keys differ."""
    return (before.k != after.k).any(dim=3).any(dim=1).any(dim=0).nonzero().flatten().tolist()


def touched(value: torch.Tensor, axes: str, pixels: tuple[int, int, int], cell: tuple[int, int, int]) -> torch.Tensor:
    place: list[Any] = [slice(None)] * 5
    for axis, wide, at in zip("THW", pixels, cell, strict=True):
        place[axes.index(axis)] = slice(at * wide, (at + 1) * wide)
    value = value.clone()
    value[tuple(place)] += 1.0
    return value


def test_no_family_is_left_out() -> None:
    elsewhere = {"ltx_video", "ltx2", "latte", "sana_video", "animatediff", "text_to_video", "i2vgen_xl", "svd"}
    from attn_plugins.patches.families import video, video_hunyuan, video_unet, video_wan

    rows = [row for module in (video, video_hunyuan, video_unet, video_wan) for row in module.FAMILIES]
    assert {row.name for row in rows} == {*LATENTS, *elsewhere}


@pytest.mark.parametrize("family", LATENTS)
def test_the_grid_is_where_the_reader_says(family: str) -> None:
    tiny = MODELS[family]
    axes, pixels, skipped = LATENTS[family]
    model, inputs = tiny.build(), tiny.inputs(1, 1)
    before = first_call(model, inputs)
    assert before.sequence.grid == GRID
    assert before.k.shape[2] == before.sequence.length
    for cell in CELLS:
        place = (cell[0] + skipped, *cell[1:])
        after = first_call(model, {**inputs, "hidden_states": touched(inputs["hidden_states"], axes, pixels, place)})
        token = (cell[0] * GRID[1] + cell[1]) * GRID[2] + cell[2]
        assert changed(before, after) == [before.sequence.text_before + token], cell


@pytest.mark.parametrize("family", BESIDE)
def test_what_stands_beside_it_is_where_the_reader_says(family: str) -> None:
    tiny = MODELS[family]
    model, inputs = tiny.build(), tiny.inputs(1, 1)
    before = first_call(model, inputs)
    sequence: Sequence = before.sequence
    after_grid = sequence.text_before + sequence.tokens
    segments = (range(sequence.text_before), range(after_grid, sequence.length))
    seen: list[set[int]] = [set(), set()]
    for side, (names, segment) in enumerate(zip(BESIDE[family], segments, strict=True)):
        for name in names:
            # its first token or frame, which is real under any padding
            value = inputs[name].clone()
            value[:, :1] += 1.0
            found = changed(before, first_call(model, {**inputs, name: value}))
            assert found and set(found) <= set(segment), name
            assert len(found) < len(segment) or len(names) == 1, name
            seen[side].update(found)
    assert bool(seen[0]) == bool(sequence.text_before) and bool(seen[1]) == bool(sequence.text_after)


@pytest.mark.parametrize("family", ["wan_vace", "wan_animate"])
def test_a_reference_frame_is_before_the_video(family: str) -> None:
    tiny = MODELS[family]
    model, inputs = tiny.build(), tiny.inputs(1, 1)
    before = first_call(model, inputs)
    latents = inputs["hidden_states"].clone()
    latents[:, :, 0] += 1.0
    assert changed(before, first_call(model, {**inputs, "hidden_states": latents})) == list(range(16))
    assert before.sequence == Sequence(GRID, text_before=16)


@pytest.mark.parametrize("family", ["ltx_video", "ltx2"])
def test_packed_tokens_are_the_grid_in_raster_order(family: str) -> None:
    """Only the rotations tell the model of an order, and each channel turns with one axis."""
    tiny = MODELS[family]
    model, inputs = tiny.build(), {**tiny.inputs(1, 1)}
    inputs["hidden_states"] = torch.ones_like(inputs["hidden_states"])  # then only the place tells keys apart
    call = first_call(model, inputs)
    assert call.sequence == Sequence(GRID)
    keys = call.k[0].transpose(0, 1).flatten(1).unflatten(0, GRID)
    turned = [(torch.diff(keys, dim=axis).abs() > 1e-6).flatten(0, 2).any(dim=0) for axis in range(3)]
    assert all(bool(channels.any()) for channels in turned)  # a step along each axis turns channels of its own
    assert int(sum(channels.long() for channels in turned).max()) == 1


def test_latte_attends_frame_by_frame_then_place_by_place() -> None:
    tiny = MODELS["latte"]
    model, inputs = tiny.build(), tiny.inputs(1, 1)
    handle = attn_plugins.patch(model, Windowed(), min_tokens=0)
    recordings = [Recording(layer.processor) for layer in handle.patches[0].layers]
    for layer, recording in zip(handle.patches[0].layers, recordings, strict=True):
        layer.processor = recording
    before = forward(model, inputs)
    layers = zip(handle.patches[0].layers, recordings, strict=True)
    grids = {layer.name: row.calls[0][0].sequence.grid for layer, row in layers}
    assert grids == {
        **{f"transformer_blocks.{index}.attn1": (4, 4) for index in range(2)},
        **{f"temporal_transformer_blocks.{index}.attn1": (3,) for index in range(2)},
    }
    spatial = recordings[0].calls[0][0].k
    latents = touched(inputs["hidden_states"], "BCTHW", (1, 2, 2), (1, 2, 3))
    assert not torch.equal(forward(model, {**inputs, "hidden_states": latents}), before)
    rows = (recordings[0].calls[1][0].k != spatial).any(dim=3).any(dim=1)
    assert rows.nonzero().tolist() == [[1, 2 * 4 + 3]]


@pytest.mark.parametrize(("family", "frames"), [("animatediff", 3), ("text_to_video", 3), ("i2vgen_xl", 3), ("svd", 3)])
def test_unets_attend_within_frames_or_over_them(family: str, frames: int) -> None:
    """Frames stand as items in the one, places in the other; after each the right grid holds again."""
    tiny = MODELS[family]
    model, inputs = tiny.build(), tiny.inputs(2, 0)
    handle = attn_plugins.patch(model, Windowed(), min_tokens=0)
    recordings = {layer.name: Recording(layer.processor) for layer in handle.patches[0].layers}
    for layer in handle.patches[0].layers:
        layer.processor = recordings[layer.name]
    forward(model, inputs)
    over_time = 0
    for name, row in recordings.items():
        for call, _ in row.calls:
            if call.sequence.grid == (frames,):
                over_time += 1
                assert any(part in name for part in ("motion_modules", "temp", "transformer_in")), name
                assert call.q.shape[0] in (2 * 24, 2 * 96), name  # two items, each place of a level
            else:
                assert call.sequence.grid in ((4, 6), (8, 12)) and call.q.shape[0] == 2 * frames, name
    assert 0 < over_time < len(recordings)
