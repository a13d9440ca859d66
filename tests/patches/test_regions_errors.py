"""What regions cannot do is said in a line, when the pipeline is patched or before the text is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.method import AttentionCall
from attn_plugins.methods.regions import RegionMaps
from attn_plugins.runtime import Refused
from tests.patches.test_regions import ALL, LEFT, NAMES, TWO, patched, pipeline
from tests.support.tiny_image_pipelines import from_sd15
from tests.support.tiny_models import MODELS
from tests.support.tiny_pipelines import build, run
from tests.support.tiny_video_pipelines import wan_image_to_video

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")
EMBEDDED = [(LEFT, torch.zeros(3, 32))]


def test_families_that_cannot() -> None:
    for name in ("ltx_video", "hunyuan_video", "pixart"):
        with pytest.raises(
            ValueError, match="beside a model's text, which is not known for .*: it is for .*FLUX.1.*Wan"
        ):
            attn_plugins.patch(MODELS[name].build(), "regions", regions=TWO)


def test_a_bare_model_takes_embeddings_alone() -> None:
    with pytest.raises(ValueError, match="are encoded by the pipeline's text encoders: patch the pipeline"):
        attn_plugins.patch(pipeline("sd15").unet, "regions", regions=TWO)


def test_a_pipeline_without_text_encoder() -> None:
    pipe = build("wan")
    pipe.register_modules(text_encoder=None)
    with pytest.raises(ValueError, match="has no tokenizer or text encoder"):
        attn_plugins.patch(pipe, "regions", regions=TWO)
    attn_plugins.patch(pipe, "regions", regions=[(LEFT, torch.zeros(16, 32))])


def test_a_length_that_a_pipeline_cannot_be_told() -> None:
    with pytest.raises(ValueError, match="max_sequence_length=16: StableDiffusionPipeline has prompts of one length"):
        attn_plugins.patch(pipeline("sd15"), "regions", regions=TWO, max_sequence_length=16)


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_see_the_text_cannot_be_left_out(name: str) -> None:
    with pytest.raises(ValueError, match="leaves out .* that see the text"):
        attn_plugins.patch(pipeline(name), "regions", regions=TWO, layers=[0])
    assert attn_plugins.summary(pipeline(name)).endswith("is not patched")


def test_sites_that_another_patch_holds() -> None:
    pipe = pipeline("flux")
    with (
        attn_plugins.patched(pipe, "gna", window=2, stride=1, layers=[0], min_tokens=0),
        pytest.raises(ValueError, match="gna"),
    ):
        attn_plugins.patch(pipe, "regions", regions=TWO)


def test_image_to_video_with_the_picture_in_the_text() -> None:
    with pytest.raises(ValueError, match="takes the tokens of a picture before 512 of text"):
        attn_plugins.patch(wan_image_to_video(), "regions", regions=TWO)


def test_pipelines_that_guide_otherwise() -> None:
    pipe = from_sd15("StableDiffusionPAGPipeline")
    with pytest.raises(ValueError, match="guides by batches of its own kind"):
        attn_plugins.patch(pipe, "regions", regions=TWO)


def test_embeddings_of_another_width() -> None:
    with patched("sdxl", EMBEDDED), pytest.raises(ValueError, match="a region's prompt has 32 channels, the text 64"):
        run("sdxl", pipeline("sdxl"))


def test_a_batch_without_halves() -> None:
    unet = pipeline("sd15").unet
    with (
        attn_plugins.patched(unet, "regions", regions=EMBEDDED, guidance="batched"),
        pytest.raises(ValueError, match="a batch of 3 has no negative half"),
    ):
        unet(torch.zeros(3, 4, 8, 8), torch.tensor(9), torch.zeros(3, 4, 32))


def test_pipelines_that_share_a_model_and_disagree() -> None:
    pipe = build("sd15")
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    for one in (pipe, other):
        attn_plugins.patch(one, "regions", regions=TWO)
    run("sd15", pipe)
    pipe._guidance_scale, other._guidance_scale = 7.5, 1.0
    with pytest.raises(ValueError, match="differ in whether they guide: say guidance="):
        pipe.unet(torch.zeros(2, 4, 8, 8), torch.tensor(9), torch.zeros(2, 77, 32))


def test_a_mask_over_the_text_stays_as_it_was_with_one_warning() -> None:
    unet = pipeline("sd15").unet
    call = {
        "sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor(9), "encoder_hidden_states": torch.randn(1, 6, 32),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0]]),
    }  # fmt: skip
    with torch.no_grad():
        plain = unet(**call).sample
        with attn_plugins.patched(unet, "regions", regions=EMBEDDED) as handle:
            with pytest.warns(UserWarning, match="the call masks its text") as seen:
                assert torch.equal(unet(**call).sample, plain)
                assert torch.equal(unet(**call).sample, plain)
            assert len(seen) == 1 and "masks its text" in handle.explain()
        with attn_plugins.patched(unet, "regions", regions=EMBEDDED, strict=True), pytest.raises(Refused):
            unet(**call)


def test_processors_that_were_replaced() -> None:
    """Slicing's processors show all prompts to all: the call stays as it was."""
    pipe = build("sd15")
    plain = run("sd15", pipe)
    attn_plugins.patch(pipe, "regions", regions=TWO)
    pipe.unet.set_attention_slice(1)
    with pytest.warns(UserWarning, match="replaced by SlicedAttnProcessor"):
        found = run("sd15", pipe)
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    attn_plugins.unpatch(pipe)


def test_no_layer_goes_on_dense_with_all_prompts_in_its_text() -> None:
    """What could not be seen before the forward: a refusal in a layer is an error there."""
    pipe = pipeline("sd3")
    with patched("sd3") as handle:
        processor = handle.patches[0].layers[0].processor
        try:
            processor.refuses = lambda call: "dropout"
            with pytest.raises(Refused, match="its prompts are in the text, so it cannot go on dense.*dropout"):
                run("sd3", pipe)
        finally:
            del processor.refuses
        call = AttentionCall(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), "joint")
        assert "outside of its model's forward" in processor.refuses(call)


def test_maps_of_another_method_or_of_nothing() -> None:
    pipe: Any = pipeline("sd15")
    with (
        attn_plugins.patched(pipe, "gna", window=2, stride=1, min_tokens=0) as handle,
        pytest.raises(ValueError, match="these maps are of patches by 'regions', not 'gna'"),
    ):
        RegionMaps(handle)
    with (
        patched("sd15", [(ALL, "a dog")]) as handle,
        RegionMaps(handle) as maps,
        pytest.raises(ValueError, match="run"),
    ):
        maps.mean()
