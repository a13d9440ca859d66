"""What each family's tokens are, and when that cannot be told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.patches import grids
from attn_plugins.sequence import Sequence
from tests.support.tiny_models import MODELS, cogvideox, flux_ids, forward
from tests.support.windowed import Windowed

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def sequences(family: str, model: Any, inputs: dict[str, Any]) -> Sequence | None:
    handle = attn_plugins.patch(model, Windowed(), min_tokens=0)
    forward(model, inputs)
    return handle.patches[0].state.last_sequence


def test_hunyuan_padding_is_valid_lengths_per_item() -> None:
    tiny = MODELS["hunyuan_video"]
    sequence = sequences("hunyuan_video", tiny.build(), tiny.inputs(2, 0))
    assert sequence == Sequence((3, 3, 4), text_after=8, valid_after=(6, 3))


def test_text_stands_where_the_model_puts_it() -> None:
    for family, expected in (("flux", (8, 0)), ("cogvideox", (16, 0)), ("sd3", (0, 8)), ("wan", (0, 0))):
        tiny = MODELS[family]
        sequence = sequences(family, tiny.build(), tiny.inputs(1, 0))
        assert sequence is not None
        assert (sequence.text_before, sequence.text_after) == expected, family


def test_cogvideox_patches_time() -> None:
    model, inputs = cogvideox(patch_size_t=2), MODELS["cogvideox"].inputs(1, 0)
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], inputs["hidden_states"][:, :1]], dim=1)
    read = grids.cogvideox(model, (), inputs)
    assert read == Sequence((2, 3, 4), text_before=16)


def test_arguments_by_position_are_found() -> None:
    tiny = MODELS["wan"]
    model, inputs = tiny.build(), tiny.inputs(1, 0)
    handle = attn_plugins.patch(model, Windowed())
    by_name = forward(model, inputs)
    with torch.no_grad():
        by_position = model(*inputs.values(), return_dict=False)[0]
    assert torch.equal(by_name, by_position)
    assert handle.patches[0].state.last_sequence.grid == (3, 3, 4)


@pytest.mark.parametrize(
    "ids",
    [
        flux_ids(5, 6)[torch.randperm(30, generator=torch.Generator().manual_seed(0))],
        flux_ids(6, 6)[:30] * 2,
    ],
    ids=["shuffled", "sparse"],
)
def test_flux_ids_that_are_not_one_picture_stay_dense(ids: torch.Tensor) -> None:
    tiny = MODELS["flux"]
    model, inputs = tiny.build(), {**tiny.inputs(1, 0), "img_ids": ids}
    dense = forward(model, inputs)
    attn_plugins.patch(model, Windowed(), dense_steps=0)
    with pytest.warns(UserWarning, match="begin with no picture in raster order"):
        assert torch.equal(forward(model, inputs), dense)
    assert torch.equal(forward(model, inputs), dense)  # and says so once


def test_ids_are_read_once_per_tensor_and_again_when_written() -> None:
    reads = []
    reading = grids.TensorReading(lambda t: reads.append(1) or float(t.sum()))
    ids = torch.ones(4)
    assert [reading(ids), reading(ids)] == [4.0, 4.0]
    assert len(reads) == 1
    ids += 1
    assert reading(ids) == 8.0
    with torch.inference_mode():
        unversioned = torch.ones(2)
        assert reading(unversioned) == 2.0
        unversioned += 1
        assert reading(unversioned) == 4.0


def test_a_new_tensor_at_an_old_address_is_read_anew() -> None:
    reading = grids.TensorReading(lambda t: t.tolist())
    memory = torch.tensor([1.0, 2.0])
    first = memory.view(2)
    assert reading(first) == [1.0, 2.0]
    version = first._version
    del first
    memory.numpy()[:] = 5.0  # behind the version counter's back, as an allocator's reuse is
    second = memory.view(2)
    assert second._version == version
    assert reading(second) == [5.0, 5.0]


def test_ltx_without_sizes_stays_dense() -> None:
    tiny = MODELS["ltx_video"]
    model, inputs = tiny.build(), tiny.inputs(1, 0)
    coords = torch.zeros(1, 3, 36)
    inputs = {**inputs, "num_frames": None, "height": None, "width": None, "video_coords": coords}
    dense = forward(model, inputs)
    attn_plugins.patch(model, Windowed())
    with pytest.warns(UserWarning, match="no raster of frames, rows and columns"):
        assert torch.equal(forward(model, inputs), dense)


def test_extra_tokens_stay_dense() -> None:
    tiny = MODELS["ltx_video"]
    model, inputs = tiny.build(), tiny.inputs(1, 0)
    extra = torch.cat([inputs["hidden_states"], inputs["hidden_states"][:, :5]], dim=1)
    inputs = {**inputs, "hidden_states": extra, "video_coords": torch.zeros(1, 3, 41)}
    dense = forward(model, inputs)
    attn_plugins.patch(model, Windowed())
    with pytest.warns(UserWarning, match="no raster of frames, rows and columns"):
        assert torch.equal(forward(model, inputs), dense)


def test_small_levels_of_a_unet_stay_dense() -> None:
    """Without a word where a larger level is sparse; with one, at the next forward, where none is."""
    tiny = MODELS["sd15"]
    model, small = tiny.build(), tiny.inputs(1, 0)
    large = {**small, "sample": torch.randn(1, 4, 64, 64)}
    dense_small, dense_large = forward(model, small), forward(model, large)
    handle = attn_plugins.patch(model, Windowed())
    assert handle.patches[0].state.min_tokens == 1024
    for _ in range(2):
        assert not torch.equal(forward(model, large), dense_large)
    assert torch.equal(forward(model, small), dense_small)
    with pytest.warns(UserWarning, match="no grid of the last forward had min_tokens=1024 tokens, the largest 24"):
        assert torch.equal(forward(model, small), dense_small)
