"""Vision transformers: what enters by another door, what stays dense, compiled and checkpointed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attn_plugins
from tests.support.tiny import randn
from tests.support.tiny_vision import SIZES, build, features, inputs

TOLERANCE = {"rtol": 1e-4, "atol": 5e-5}


def patch(model: Any, window: int = 2) -> attn_plugins.PatchHandle:
    return attn_plugins.patch(model, "gna", window=window, stride=1)


def dual(kind: str = "CLIP") -> Any:
    """A model of text and pictures."""
    import transformers

    torch.manual_seed(0)
    text = {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    text |= {"vocab_size": 64, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config={**SIZES, "num_patches": 16})
    return getattr(transformers, f"{kind}Model")(config).eval()


def picture(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True).pooler_output


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_part_called_by_itself_reads_its_own_grid(kind: str) -> None:
    """6 x 4 patches after 4 x 6: as many tokens, another grid, and the root's forward is not called at all."""
    model = dual(kind)
    wide, high = randn(1, 3, 32, 48), randn(1, 3, 48, 32)
    ids = torch.tensor([[1, 7, 8, 2]])
    with torch.no_grad():
        text = model.get_text_features(ids).pooler_output
    patch(model)
    alone = picture(model, high)
    with torch.no_grad():
        model(input_ids=ids, pixel_values=wide, interpolate_pos_encoding=True)
    assert torch.equal(picture(model, high), alone)
    handle = patch(model)
    assert handle.patches[0].state.last_sequence.grid == (6, 4)
    assert all(layer.name.startswith("vision_model.") for layer in handle.patches[0].layers)
    assert model.config.text_config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(model.get_text_features(ids).pooler_output, text)


def test_a_text_model_is_no_vision_model() -> None:
    with pytest.raises(ValueError, match="no family of models knows CLIPTextModel"):
        patch(dual().text_model)


def fallback(model: Any, given: dict[str, Any], words: str) -> None:
    """The call is dense, bit by bit, with one warning."""
    with torch.no_grad():
        dense = model(**given)[0]
        patch(model)
        with pytest.warns(UserWarning, match=words) as caught:
            assert torch.equal(model(**given)[0], dense)
            model(**given)
    assert len([row for row in caught if "attn_plugins" in str(row.message)]) == 1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_left_out_patches_are_dense(implementation: str) -> None:
    model, given = build("VideoMAE"), inputs("VideoMAE", 1)
    model.set_attn_implementation(implementation)
    fallback(model, {**given, "bool_masked_pos": torch.arange(32)[None] % 2 == 0}, "16 tokens where")


def test_pictures_of_several_sizes_in_one_call_are_dense() -> None:
    given = inputs("SigLIP 2", 2, 0)
    given["spatial_shapes"] = torch.tensor([[4, 4], [2, 8]])
    fallback(build("SigLIP 2"), given, "differ in size")
    model, given = build("Qwen2-VL"), inputs("Qwen2-VL", 2, 0)
    mixed = {**given, "grid_thw": torch.tensor([[1, 4, 4], [1, 2, 8]])}
    fallback(model, mixed, "differ in size")
    attn_plugins.unpatch(model)
    dense = features("Qwen2-VL", model, mixed)
    patch(model)
    features("Qwen2-VL", model, given)
    with pytest.warns(UserWarning, match="differ in size"):  # as many tokens as before, but not their grid
        assert torch.equal(features("Qwen2-VL", model, mixed), dense)


def test_a_mask_that_is_no_padding_is_dense() -> None:
    given = inputs("SigLIP 2", 1)
    given["pixel_attention_mask"] = given["pixel_attention_mask"].clone()
    given["pixel_attention_mask"][0, 2] = 0
    fallback(build("SigLIP 2"), given, "not the padding")


def test_without_a_mask_padding_is_attended_as_the_model_does() -> None:
    given = inputs("SigLIP 2", 1) | {"pixel_attention_mask": None}
    model = build("SigLIP 2")
    with torch.no_grad():
        dense = model(**given)[0]
        patch(model, window=-1)
        torch.testing.assert_close(model(**given)[0], dense, **TOLERANCE)


def test_frames_of_a_clip_are_pictures_of_their_own() -> None:
    model, one = build("Qwen2-VL"), inputs("Qwen2-VL", 2)
    patch(model)
    clip = {**one, "grid_thw": torch.tensor([[2, 4, 4]])}
    torch.testing.assert_close(features("Qwen2-VL", model, clip), features("Qwen2-VL", model, one), **TOLERANCE)


@pytest.mark.parametrize("name", ["ViT", "DINOv3", "CLIP"])
def test_compiles_whole(name: str) -> None:
    model = build(name)
    patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    for size in (0, 1):
        given = inputs(name, 2, size)
        plain = features(name, model, given)
        torch.testing.assert_close(features(name, compiled, given), plain, **TOLERANCE)
    attn_plugins.unpatch(model)
    torch.testing.assert_close(features(name, compiled, given), features(name, model, given), **TOLERANCE)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradients_through_checkpoints_of_two_sizes() -> None:
    """The backward of one picture's blocks after another picture's forward: each recomputes on its own grid."""
    found = []
    for checkpointed in (False, True):
        model = build("ViT").train()
        patch(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        wide, high = (
            model(pixel_values=randn(1, 3, *size), interpolate_pos_encoding=True)[0] for size in ((32, 48), (48, 32))
        )
        (wide.sin().sum() + high.cos().sum()).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert found[0]
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)
