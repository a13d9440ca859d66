"""Pictures beside the one that is made, padded prompts, and the calls that must stay dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.patches.grids import image, packed
from attn_plugins.sequence import Sequence
from tests.support import tiny_controlnets, tiny_image_models, tiny_packed_image_models, tiny_unets
from tests.support.tiny import built, forward, randn
from tests.support.tiny_packed_image_models import flux_ids
from tests.support.windowed import Recording, Windowed, brute_force, shrunk

pytestmark = pytest.mark.usefixtures("quiet_diffusers")
MODELS = {**tiny_image_models.MODELS, **tiny_packed_image_models.MODELS, **tiny_controlnets.MODELS}


def check_sparse(model: Any, inputs: dict[str, Any], expected: Sequence) -> None:
    """Whole windows are dense attention; small ones what brute force says of the expected sequence."""
    dense = forward(model, inputs)
    with attn_plugins.patched(model, Windowed(), size=0):
        torch.testing.assert_close(forward(model, inputs), dense)
    with attn_plugins.patched(model, Windowed(), size=2) as handle:
        calls: list[Any] = []
        for layer in handle.patches[0].layers:
            layer.processor = recording = Recording(layer.processor)
            recording.calls = calls
        assert not torch.equal(forward(model, inputs), dense)
    joint = [(call, out) for call, out in calls if call.kind == "joint"]
    assert joint
    for call, out in joint:
        assert call.sequence == expected
        allowed = brute_force(call, shrunk(expected, 2), (1,) * len(expected.grid))
        torch.testing.assert_close(out.double(), allowed, atol=2e-6, rtol=1e-5)


def check_dense(model: Any, inputs: dict[str, Any], why: str) -> None:
    """Dense, and said once."""
    dense = forward(model, inputs)
    attn_plugins.patch(model, Windowed(), dense_steps=0)
    with pytest.warns(UserWarning, match=why):
        assert torch.equal(forward(model, inputs), dense)
    assert torch.equal(forward(model, inputs), dense)


@pytest.mark.parametrize(
    "reference",
    [flux_ids(3, 4, time=1), flux_ids(5, 6, time=1), flux_ids(5, 6), flux_ids(3, 4, time=1, row=5, column=6)],
    ids=["Kontext", "as large as the picture", "not even another time", "elsewhere"],
)
def test_references_of_flux_are_seen_and_see_everything(reference: torch.Tensor) -> None:
    tiny = MODELS["flux"]
    inputs = tiny.inputs(2, 0)
    inputs["img_ids"] = torch.cat([inputs["img_ids"], reference])
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], randn(2, len(reference), 4, seed=3)], dim=1)
    check_sparse(tiny.build(), inputs, Sequence((5, 6), text_before=8, text_after=len(reference)))


def test_a_reference_beside_the_picture_stays_dense() -> None:
    """At the same time and with columns that go on: no way to tell where the picture ends."""
    tiny = MODELS["flux"]
    inputs = tiny.inputs(1, 0)
    inputs["img_ids"] = torch.cat([inputs["img_ids"], flux_ids(5, 6, column=6)])
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], randn(1, 30, 4, seed=3)], dim=1)
    check_dense(tiny.build(), inputs, "no picture in raster order")


def test_several_references_of_flux2() -> None:
    tiny = MODELS["flux2"]
    inputs = tiny.inputs(2, 1)
    inputs["img_ids"] = torch.cat([inputs["img_ids"], flux_ids(2, 2, time=20, axes=4)]).repeat(2, 1, 1)
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], randn(2, 4, 4, seed=3)], dim=1)
    check_sparse(tiny.build(), inputs, Sequence((6, 6), text_before=8, text_after=16))


def flux2_with_cache() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Klein KV: (model, inputs of the first step, those of the later ones)."""
    from diffusers.models.transformers import transformer_flux2 as source

    tiny = MODELS["flux2"]
    model, inputs = tiny.build(), tiny.inputs(2, 0)
    for name, module in model.named_modules():
        if isinstance(module, source.Flux2ParallelSelfAttention):
            module.set_processor(source.Flux2KVParallelSelfAttnProcessor())
        elif name.endswith(".attn"):
            module.set_processor(source.Flux2KVAttnProcessor())
    ids, latents = inputs["img_ids"], inputs["hidden_states"]
    first = {  # the references stand before the picture
        **inputs,
        "img_ids": torch.cat([ids[30:], ids[:30]]),
        "hidden_states": torch.cat([latents[:, 30:], latents[:, :30]], dim=1),
        "kv_cache_mode": "extract",
        "num_ref_tokens": 12,
    }
    with torch.no_grad():
        cache = model(**first).kv_cache
    later = {"img_ids": ids[:30], "hidden_states": latents[:, :30], "kv_cache": cache, "kv_cache_mode": "cached"}
    return model, first, {**inputs, **later}


def test_cached_keys_of_references_count_as_text() -> None:
    model, _, later = flux2_with_cache()
    check_sparse(model, later, Sequence((5, 6), text_before=20))


def test_references_see_themselves_alone_while_they_are_cached() -> None:
    model, first, later = flux2_with_cache()
    check_sparse(model, first, Sequence((5, 6), text_before=20))
    with attn_plugins.patched(model, Windowed(), size=2), torch.no_grad():
        cache = model(**first).kv_cache
    of_first_layer = cache.get_double(0).get(), later["kv_cache"].get_double(0).get()
    assert all(torch.equal(one, two) for one, two in zip(*of_first_layer, strict=True))
    of_last_layer = cache.get_single(0).get(), later["kv_cache"].get_single(0).get()
    assert all(torch.equal(one, two) for one, two in zip(*of_last_layer, strict=True))


def test_qwen_edit_with_two_references() -> None:
    inputs = tiny_packed_image_models._qwen_inputs(2, 0, references=((1, 3, 4), (1, 5, 6)))
    expected = Sequence((5, 6), text_before=8, text_after=42, valid_before=(5, 3))
    check_sparse(MODELS["qwen_image"].build(), inputs, expected)


def test_qwen_layers_are_one_grid() -> None:
    """Three layers, and the picture that they are taken from."""
    model = tiny_packed_image_models.qwen_image(use_layer3d_rope=True)
    inputs = tiny_packed_image_models._qwen_inputs(1, 0, references=((1, 5, 6), (1, 5, 6), (1, 4, 5)))
    check_sparse(model, inputs, Sequence((3, 5, 6), text_before=8, text_after=20, valid_before=5))


def test_pictures_of_different_sizes_in_one_batch_stay_dense() -> None:
    tiny = MODELS["qwen_image"]
    inputs = tiny.inputs(2, 0)
    inputs["img_shapes"] = [[(1, 5, 6), (1, 3, 4)], [(1, 6, 5), (1, 3, 4)]]
    check_dense(tiny.build(), inputs, "the pictures of the batch differ in size")


@pytest.mark.parametrize(
    ("name", "mask"), [("qwen_image", "encoder_hidden_states_mask"), ("krea2", "encoder_attention_mask")]
)
def test_holes_in_a_prompt_stay_dense(name: str, mask: str) -> None:
    """Krea 2 puts what its template ends with behind the padding."""
    tiny = MODELS[name]
    inputs = tiny.inputs(2, 0)
    inputs[mask] = torch.tensor([[1, 1, 1, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 1, 1]], dtype=inputs[mask].dtype)
    check_dense(tiny.build(), inputs, "not padding at its end")


def test_prompts_padded_in_front_stay_dense() -> None:
    """Ideogram 4 pads in front of its prompts, as segments of their own."""
    tiny = MODELS["ideogram4"]
    inputs = tiny.inputs(1, 0)
    inputs["segment_ids"][:, :3] = -1
    inputs["indicator"][:, :3] = 0
    check_dense(tiny.build(), inputs, "prompts are padded")


def test_ideogram_without_a_prompt() -> None:
    """Guidance's second call."""
    tiny = MODELS["ideogram4"]
    inputs = tiny.inputs(1, 0)
    inputs |= {name: value[:, 8:] for name, value in inputs.items() if name != "timestep"}
    check_sparse(tiny.build(), inputs, Sequence((5, 6)))


def test_lumina2_batches_of_unequal_prompts_stay_dense() -> None:
    tiny = MODELS["lumina2"]
    inputs = tiny.inputs(2, 0)
    inputs["encoder_attention_mask"][1, 3:] = 0
    check_dense(tiny.build(), inputs, "prompts of 5, 3 tokens put the pictures of a batch at different places")


def test_hunyuan_image_with_glyphs() -> None:
    """The real text of both encoders stands before the padding of both."""
    tiny = MODELS["hunyuan_image"]
    inputs = {
        **tiny.inputs(2, 0),
        "encoder_hidden_states_2": randn(2, 6, 8, seed=4),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]),
    }
    expected = Sequence((5, 6), text_after=14, valid_after=(7, 7))
    check_sparse(tiny_image_models.hunyuan_image(glyphs=8), inputs, expected)


def test_bria_fibo2_with_pictures_to_edit() -> None:
    tiny = MODELS["bria_fibo2"]
    inputs = {**tiny.inputs(2, 0), "context_latents": [randn(2, 4, 6, 8, seed=4), randn(2, 4, 4, 4, seed=5)]}
    gists = Sequence((5, 6), text_after=24, valid_after=(24, 22))
    check_sparse(tiny.build(), inputs, gists)
    inputs["encoder_attention_mask"][1] = inputs["encoder_attention_mask"][0]
    check_sparse(tiny.build(), inputs, Sequence((5, 6), text_before=8, text_after=16))


def test_a_controlnet_of_several_modes() -> None:
    """Its mode is one more token before the text."""
    inputs = {**MODELS["flux_controlnet"].inputs(2, 0), "controlnet_mode": torch.zeros(2, 1, dtype=torch.long)}
    check_sparse(tiny_controlnets.flux_controlnet(modes=3), inputs, Sequence((5, 6), text_before=9))


def test_what_no_reader_can_tell() -> None:
    picture = randn(4, 1, 10, 12)
    model = MODELS["z_image"].build()
    assert "omni" in image.z_image(model, (), {"x": [[picture, picture]], "cap_feats": [[randn(7, 8)]]})
    differ = {"x": [picture, picture[:, :, :4]], "cap_feats": [randn(7, 8)] * 2}
    assert "differ in size" in image.z_image(model, (), differ)
    packed_tokens = {"hidden_states": randn(1, 30, 16)}
    assert "packed" in image.hidream(MODELS["hidream"].build(), (), packed_tokens)
    assert "embedded" in image.sd3_controlnet(MODELS["sd3_controlnet"].build(), (), packed_tokens)
    shapes = {"img_shapes": [[(1, 5, 6), (1, 5, 6)]], "encoder_hidden_states": randn(1, 8, 16)}
    assert "reference" in packed.nucleus_image(MODELS["nucleus_image"].build(), (), shapes)


def test_qwen_image21_with_a_reference() -> None:
    """Prompt and reference attend in calls of their own, block by block; the picture sees all of them."""
    tiny = MODELS["qwen_image21"]
    words, slots = [0, 0, 0, 1, 1, 0, 0], [1] * 6  # a reference of 2 x 4 tokens amid the words, then the picture
    inputs = {
        **tiny.inputs(2, 0),
        "hidden_states": randn(2, 32, 4),
        "encoder_hidden_states": randn(2, 7, 16, seed=2),
        "encoder_hidden_states_mask": None,
        "img_shapes": [[(1, 2, 4), (1, 4, 6)]] * 2,
        "img_mask": torch.tensor([words + slots] * 2, dtype=torch.bool),
    }
    check_sparse(tiny.build(), inputs, Sequence((4, 6), text_before=13))
    inputs["encoder_hidden_states_mask"] = torch.ones(2, 7, dtype=torch.bool).index_fill(1, torch.tensor([6]), False)
    check_dense(tiny.build(), inputs, "prompts with references in them are padded")


@pytest.mark.parametrize("family", ["z_image", "flux2"])
def test_steps_of_a_bare_model_are_counted_whichever_way_time_runs(family: str) -> None:
    tiny = MODELS[family]
    model, inputs = tiny.build(), tiny.inputs(1, 0)
    name = "t" if family == "z_image" else "timestep"
    times = (0.1, 0.5, 0.9, 0.1) if family == "z_image" else (0.9, 0.5, 0.1, 0.9)
    handle = attn_plugins.patch(model, Windowed(), dense_steps=1)
    dense = []
    for time in times:
        forward(model, {**inputs, name: torch.tensor([time])})
        dense.append(handle.patches[0].state.moment.dense)
    assert dense == [True, False, False, True]


def test_the_controlnet_union_of_sdxl() -> None:
    model = built(
        "ControlNetUnionModel", block_out_channels=(8, 16), layers_per_block=1, in_channels=4, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=64, attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80, conditioning_embedding_out_channels=(8, 8), num_trans_channel=8,
        num_trans_head=2, num_proj_channel=8,
    )  # fmt: skip
    inputs = {
        **tiny_unets.MODELS["sdxl"].inputs(2, 0),
        "controlnet_cond": [randn(2, 3, 16, 24, seed=9)],
        "control_type": torch.eye(6)[:1].repeat(2, 1),
        "control_type_idx": [0],
    }
    dense = forward(model, inputs)
    handle = attn_plugins.patch(model, Windowed(), size=0, min_tokens=0)
    torch.testing.assert_close(forward(model, inputs), dense)
    assert handle.patches[0].state.last_sequence == Sequence((4, 6))
    attn_plugins.unpatch(model)
    with attn_plugins.patched(model, Windowed(), size=2, min_tokens=0):
        assert not torch.equal(forward(model, inputs), dense)
    assert torch.equal(forward(model, inputs), dense)
