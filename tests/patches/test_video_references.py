"""What stands beside a video: references, history, conditioning, padding; and what stays dense, with a word."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.method import AttentionCall, MethodConfig, Processor, SiteKind
from attn_plugins.patches.grids import video_references
from attn_plugins.sequence import Sequence
from tests.support.tiny import randn
from tests.support.tiny_models import MODELS, forward
from tests.support.tiny_video_grids import kandinsky6
from tests.support.tiny_video_joint import motif_video
from tests.support.tiny_video_wan import skyreels_v2
from tests.support.windowed import Windowed

pytestmark = pytest.mark.usefixtures("quiet_diffusers")
FULL: dict[str, Any] = {"size": 0, "min_tokens": 0, "dense_steps": 0}


def sequence_of(model: Any, inputs: dict[str, Any]) -> Sequence:
    """What the reader says, after a full window was dense attention and a small one something else."""
    dense = forward(model, inputs)
    handle = attn_plugins.patch(model, Windowed(), **FULL, strict=True)
    torch.testing.assert_close(forward(model, inputs), dense)
    sequence = handle.patches[0].state.last_sequence
    handle.remove()
    with attn_plugins.patched(model, Windowed(), **{**FULL, "size": 2}, strict=True):
        assert not torch.allclose(forward(model, inputs), dense)
    assert torch.equal(forward(model, inputs), dense)
    assert sequence is not None
    return sequence


def stays_dense(model: Any, inputs: dict[str, Any], why: str) -> None:
    dense = forward(model, inputs)
    with attn_plugins.patched(model, Windowed(), **{**FULL, "size": 2}):
        with pytest.warns(UserWarning, match=why):
            assert torch.equal(forward(model, inputs), dense)
        assert torch.equal(forward(model, inputs), dense)  # and says so once


@pytest.mark.parametrize("references", [0, 2])
def test_wan_vace_counts_its_references(references: int) -> None:
    tiny = MODELS["wan_vace"]
    control = randn(2, 12, 4, 6, 8, seed=2)
    control[:, 4:8, :references] = 0
    inputs = {**tiny.inputs(2, 0), "control_hidden_states": control}
    expected = Sequence((4 - references, 3, 4), text_before=12 * references)
    assert sequence_of(tiny.build(), inputs) == expected


def test_wan_vace_without_a_video_to_change_has_no_references() -> None:
    control = torch.zeros(1, 12, 4, 6, 8)
    assert video_references._leading_references(control, 4) == 0


def test_framepack_alone_comes_without_its_padding() -> None:
    tiny = MODELS["framepack"]
    sequence = sequence_of(tiny.build(), tiny.inputs(1, 0))
    # history: 2 x 1 x 1 tokens of 5 frames, 2 x 2 x 2 of 3 frames, 1 x 3 x 4 of 1 frame
    assert sequence == Sequence((3, 3, 4), text_before=22, text_after=12, valid_after=(10,))


def test_history_that_is_not_given_is_no_tokens() -> None:
    tiny = MODELS["helios"]
    inputs = {**tiny.inputs(1, 0), "latents_history_long": None, "indices_latents_history_mid": None}
    assert sequence_of(tiny.build(), inputs) == Sequence((3, 3, 4), text_before=12)


def test_hunyuan_video15_without_a_picture() -> None:
    """Text to video passes a picture of zeros, whose tokens are padding."""
    tiny = MODELS["hunyuan_video15"]
    inputs = {**tiny.inputs(2, 0), "image_embeds": torch.zeros(2, 4, 14)}
    assert sequence_of(tiny.build(), inputs) == Sequence((3, 3, 4), text_after=17, valid_after=(11, 6))


def test_hunyuan_video15_makes_no_mask_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In sparse and in dense steps; a dense step is what the model gives."""
    tiny = MODELS["hunyuan_video15"]
    model, inputs = tiny.build(), tiny.inputs(2, 0)
    dense = forward(model, inputs)
    tokens = 36 + 17
    made: list[tuple[int, ...]] = []
    repeat = torch.Tensor.repeat

    def watched(self: torch.Tensor, *sizes: Any) -> torch.Tensor:
        out = repeat(self, *sizes)
        made.append(tuple(out.shape[-2:]))
        return out

    monkeypatch.setattr(torch.Tensor, "repeat", watched)
    forward(model, inputs)
    assert (tokens, tokens) in made
    for settings in ({"dense_steps": 0}, {"dense_steps": 5}):
        made.clear()
        with attn_plugins.patched(model, Windowed(), **{**FULL, **settings}):
            torch.testing.assert_close(forward(model, inputs), dense)
        assert (tokens, tokens) not in made


@pytest.mark.parametrize(
    ("mask", "valid"), [(None, 12), ([[1, 1, 0, 0, 0, 0, 0, 0]], 6), ([[0, 0, 1, 1, 1, 1, 1, 1]], "elsewhere")]
)
def test_motif_video_prompts(mask: Any, valid: Any) -> None:
    tiny = MODELS["motif_video"]
    model = tiny.build()
    inputs = {**tiny.inputs(1, 0), "encoder_attention_mask": None if mask is None else torch.tensor(mask)}
    if valid == "elsewhere":
        stays_dense(model, inputs, "mask is not padding at its end")
    else:
        assert sequence_of(model, inputs) == Sequence((3, 3, 4), text_after=12, valid_after=valid)


def test_motif_video_decoder_layers_stay_dense() -> None:
    tiny = MODELS["motif_video"]
    model, inputs = motif_video(decoder_layers=1), tiny.inputs(1, 0)
    attn_plugins.patch(model, Windowed(), **{**FULL, "size": 2})
    with pytest.warns(UserWarning, match="72 tokens where the model's 12 text"):
        sparse = forward(model, inputs)
    attn_plugins.unpatch(model)
    assert not torch.equal(sparse, forward(model, inputs))


def test_skyreels_under_a_causal_mask_stays_dense() -> None:
    tiny = MODELS["skyreels_v2"]
    inputs = {**tiny.inputs(1, 0), "hidden_states": randn(1, 4, 4, 6, 8)}
    stays_dense(skyreels_v2(num_frame_per_block=2), inputs, "attention mask")


def test_kandinsky5_with_sparse_attention_of_its_own_keeps_it() -> None:
    from attn_plugins.patches.grids import video

    tiny = MODELS["kandinsky5"]
    read = video.kandinsky5(tiny.build(), (), {**tiny.inputs(1, 0), "sparse_params": {"to_fractal": True}})
    assert isinstance(read, str) and "NABLA" in read


def test_kandinsky6_begins_with_a_picture() -> None:
    """The pipeline appends it as a frame that stands where the first one does."""
    tiny = MODELS["kandinsky6"]
    inputs = {
        **tiny.inputs(1, 0),
        "hidden_states": randn(1, 4, 6, 8, 4),
        "visual_rope_pos": (torch.tensor([0, 1, 2, 0]), torch.arange(3), torch.arange(4)),
    }
    assert sequence_of(kandinsky6(), inputs) == Sequence((3, 3, 4), text_after=12)
    silent = {**tiny.inputs(1, 0), "audio_hidden_states": None}
    assert sequence_of(kandinsky6(), silent) == Sequence((3, 3, 4))


def coords(frames: range, height: int, width: int, fps: float = 25.0) -> torch.Tensor:
    """(1, 3, N) pixel coordinates of latents, the first of which is one frame, the others eight."""
    grid = torch.meshgrid(torch.tensor(list(frames)), torch.arange(height), torch.arange(width), indexing="ij")
    times, rows, columns = (axis.flatten().float() for axis in grid)
    return torch.stack([(times * 8 - 7).clamp(min=0) / fps, rows * 32, columns * 32])[None]


VIDEO, FRAME = coords(range(3), 3, 4), coords(range(2, 3), 3, 4)


@pytest.mark.parametrize(
    ("parts", "before", "after"),
    [
        ([VIDEO], 0, 0),
        ([FRAME, VIDEO], 12, 0),
        ([coords(range(1, 3), 3, 4), FRAME, VIDEO], 36, 0),
        ([VIDEO, FRAME], 0, 12),
        ([coords(range(1), 2, 2), VIDEO], 4, 0),
    ],
    ids=["video", "keyframe", "clip and keyframe", "keyframe behind", "another size"],
)
def test_ltx_conditions_are_dense(parts: list[torch.Tensor], before: int, after: int) -> None:
    tiny = MODELS["ltx_video"]
    where = torch.cat(parts, dim=2)
    inputs = {**tiny.inputs(1, 0), "hidden_states": randn(1, where.shape[2], 8), "video_coords": where}
    inputs.update(num_frames=None, height=None, width=None)
    expected = Sequence((3, 3, 4), text_before=before, text_after=after)
    assert sequence_of(tiny.build(), inputs) == expected


def test_ltx_windows_of_a_long_video() -> None:
    """Their pipeline says that the video is one token (num_frames=height=width=1) and gives the coordinates."""
    tiny = MODELS["ltx_video"]
    where = torch.cat([VIDEO, coords(range(1), 3, 4) - torch.tensor([0.3, 0, 0])[None, :, None]], dim=2)
    inputs = {**tiny.inputs(1, 0), "hidden_states": randn(1, 48, 8), "video_coords": where}
    inputs.update(num_frames=1, height=1, width=1)
    assert sequence_of(tiny.build(), inputs) == Sequence((3, 3, 4), text_after=12)


def test_ltx_coordinates_without_an_order_stay_dense() -> None:
    tiny = MODELS["ltx_video"]
    where = VIDEO[:, :, torch.randperm(36, generator=torch.Generator().manual_seed(0))]
    inputs = {**tiny.inputs(1, 0), "video_coords": where, "num_frames": None, "height": None, "width": None}
    stays_dense(tiny.build(), inputs, "no raster of frames, rows and columns")


def ltx2_inputs(extra: torch.Tensor) -> dict[str, Any]:
    """As the LTX-2 pipelines make them: sizes of the video, coordinates of it and of what is appended."""
    tiny = MODELS["ltx2"]
    model, inputs = tiny.build(), tiny.inputs(1, 0)
    video = model.rope.prepare_video_coords(1, 3, 3, 4, torch.device("cpu"), fps=24.0)
    where = torch.cat([video, torch.stack([extra, extra + 1], dim=-1)], dim=2)
    return {**inputs, "hidden_states": randn(1, where.shape[2], 4), "video_coords": where}


@pytest.mark.parametrize("frame", [0, 2, 3], ids=["first", "last", "behind the last"])
def test_ltx2_keyframes_are_dense(frame: int) -> None:
    tiny = MODELS["ltx2"]
    inputs = ltx2_inputs(coords(range(frame, frame + 1), 3, 4, fps=24.0))
    assert sequence_of(tiny.build(), inputs) == Sequence((3, 3, 4), text_after=12)


def test_ltx2_under_an_attention_mask_of_references_stays_dense() -> None:
    inputs = ltx2_inputs(FRAME)
    inputs["video_self_attention_mask"] = torch.ones(1, 48, 48)
    stays_dense(MODELS["ltx2"].build(), inputs, "attention mask")


def test_ltx2_tokens_that_do_not_begin_with_the_video_stay_dense() -> None:
    inputs = ltx2_inputs(FRAME)
    inputs["video_coords"] = inputs["video_coords"].flip(2)
    stays_dense(MODELS["ltx2"].build(), inputs, "first tokens of video_coords are not the video")


def test_time_alone_is_dense_without_a_word_unless_asked_for(recwarn: pytest.WarningsRecorder) -> None:
    tiny = MODELS["latte"]
    model, inputs = tiny.build(), {**tiny.inputs(1, 0), "hidden_states": randn(1, 4, 3, 32, 32)}
    handle = attn_plugins.patch(model, Windowed(), dense_steps=0)
    assert handle.patches[0].state.min_tokens == 256
    forward(model, inputs)
    forward(model, inputs)
    assert not [row for row in recwarn if "attn_plugins" in str(row.message)]
    assert handle.patches[0].state.last_sequence == Sequence((16, 16))


class DenseCross(Processor):
    """Attention as it was; counts its calls by the number of keys."""

    def __init__(self) -> None:
        self.keys: list[int] = []

    def refuses(self, call: AttentionCall) -> str | None:
        return None

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        assert call.kind == "cross"
        self.keys.append(call.k.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v, call.mask, scale=call.scale)


class Cross(Windowed):
    name = "cross"
    sites = frozenset({"cross"})

    def __init__(self) -> None:
        self.seen = DenseCross()

    def processor(self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind) -> Processor:
        return self.seen


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("sana_video", {8}),
        ("wan", {8}),
        ("cosmos", {8}),
        ("allegro", {8}),
        ("ltx2", {8}),
        ("kandinsky6", {8}),
        ("svd", {1}),
    ],
)
def test_cross_attention_is_a_site_of_its_own(family: str, keys: set[int]) -> None:
    """The only one where self-attention is linear (SANA-Video); a method over grids is refused there."""
    tiny = MODELS[family]
    model, inputs, method = tiny.build(), tiny.inputs(2, 0), Cross()
    dense = forward(model, inputs)
    attn_plugins.patch(model, method, dense_steps=0)
    torch.testing.assert_close(forward(model, inputs), dense)
    assert set(method.seen.keys) == keys
    attn_plugins.unpatch(model)
    assert torch.equal(forward(model, inputs), dense)
    if family == "sana_video":
        with pytest.raises(ValueError, match="zero sites"):
            attn_plugins.patch(model, Windowed())


def test_items_without_their_padding() -> None:
    sequence = Sequence((2, 3), text_before=2, text_after=5, valid_after=(4, 1))
    assert sequence.without_padding(12) == Sequence((2, 3), 2, 4)
    assert sequence.without_padding(9) == Sequence((2, 3), 2, 1)
    assert sequence.without_padding(10) is None
    assert Sequence((6,)).without_padding(6) == Sequence((6,))
