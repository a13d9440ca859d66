"""MIP on FLUX taken back: with the adapter loaded, unloaded, loaded again; copied, pickled, compiled, trained."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch

import attn_plugins
from tests.patches.test_mip_flux import GUIDED, TWO, close, differs
from tests.support.beside import SMALL, traces
from tests.support.flux_adapters import checkpoint, embeds, latents, load, pipeline
from tests.support.snapshot import snapshot
from tests.support.tiny import randn

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")
IMAGES = embeds(1, 2)


def state(pipe: Any) -> Any:
    return snapshot(pipe.transformer), snapshot(pipe.text_encoder_2), list(vars(pipe))


def test_exact_undo() -> None:
    pipe = pipeline()
    attn_plugins.patch(pipe, "mip", **TWO).remove()  # what is loaded once stays
    stock, before = latents(pipe, IMAGES, **GUIDED), state(pipe)
    handle = attn_plugins.patch(pipe, "mip", **TWO)
    assert attn_plugins.patch(pipe, "mip", **TWO) is handle and state(pipe) != before
    assert differs(latents(pipe, IMAGES, **GUIDED), stock)
    assert "mip" in handle.summary() and "transformer_blocks.1.attn: cross, mip" in handle.explain()
    attn_plugins.unpatch(pipe)
    assert state(pipe) == before
    assert torch.equal(latents(pipe, IMAGES, **GUIDED), stock)


@pytest.mark.parametrize("unpatched_first", [True, False])
def test_unpatch_and_unload_in_either_order(unpatched_first: bool) -> None:
    pipe = pipeline(0)
    plain = latents(pipe)
    load(pipe, checkpoint(pipe.transformer))
    stock = latents(pipe, IMAGES)
    handle = attn_plugins.patch(pipe, "mip", **TWO)
    latents(pipe, IMAGES)
    if unpatched_first:
        handle.remove()
        assert torch.equal(latents(pipe, IMAGES), stock)
    pipe.unload_ip_adapter()
    if not unpatched_first:
        with pytest.warns(UserWarning, match="the IP-Adapter was unloaded: call pipe.load_ip_adapter"):
            assert torch.equal(latents(pipe), plain)
        handle.remove()
    assert torch.equal(latents(pipe), plain)
    assert not traces(pipe.transformer) and not pipe.text_encoder_2._forward_hooks
    load(pipe, checkpoint(pipe.transformer))
    assert torch.equal(latents(pipe, IMAGES), stock)


@pytest.mark.parametrize("unloaded", [True, False])
def test_loaded_again_it_is_merged_again(unloaded: bool) -> None:
    pipe = pipeline()
    handle = attn_plugins.patch(pipe, "mip", **TWO)
    merged = latents(pipe, IMAGES)
    if unloaded:
        pipe.unload_ip_adapter()
    load(pipe, checkpoint(pipe.transformer))
    assert torch.equal(latents(pipe, IMAGES), merged)
    load(pipe, checkpoint(pipe.transformer, seed=7))
    assert differs(latents(pipe, IMAGES), merged)
    handle.remove()
    assert not traces(pipe.transformer)


def test_copied_it_is_patched_on_its_own() -> None:
    """A copy hears the same text encoder, until the last one that does is unpatched."""
    pipe = pipeline()
    stock = latents(pipe, IMAGES)
    handle = attn_plugins.patch(pipe, "mip", **TWO)
    merged = latents(pipe, IMAGES)
    original, pipe.transformer = pipe.transformer, copy.deepcopy(pipe.transformer)
    assert torch.equal(latents(pipe, IMAGES), merged)
    handle.remove()
    assert not traces(original)
    pipe.text_encoder_2.shared.weight.data.mul_(1.01)  # so that every encoding is new
    assert differs(latents(pipe, IMAGES), stock)
    attn_plugins.unpatch(pipe.transformer)
    pipe.text_encoder_2.shared.weight.data.div_(1.01)
    assert not traces(pipe.transformer) and not pipe.text_encoder_2._forward_hooks
    close(latents(pipe, IMAGES), stock)


def test_pickled_it_needs_the_pipeline_again() -> None:
    pipe = pipeline()
    attn_plugins.patch(pipe, "mip", **TWO)
    merged, buffer = latents(pipe, IMAGES), io.BytesIO()
    torch.save(pipe.transformer, buffer)
    buffer.seek(0)
    pipe.transformer = torch.load(buffer, weights_only=False)
    with pytest.raises(ValueError, match="a model from a file: unpatch, and patch again"):
        latents(pipe, IMAGES)
    attn_plugins.unpatch(pipe.transformer)
    assert not traces(pipe.transformer)
    attn_plugins.patch(pipe, "mip", **TWO)
    assert torch.equal(latents(pipe, IMAGES), merged)


def test_two_pipelines_do_not_see_each_other_nor_do_threads() -> None:
    one, two = pipeline(), pipeline()
    stock = latents(two, IMAGES)
    attn_plugins.patch(one, "mip", **TWO)
    merged = latents(one, IMAGES)
    assert torch.equal(latents(two, IMAGES), stock)
    attn_plugins.patch(two, "mip", phrases=["mat", "cat"])
    latents(two, IMAGES)
    assert torch.equal(latents(one, IMAGES), merged)
    other = "the mat, the big dog and a cat"
    call = [one.encode_prompt(text, max_sequence_length=32) for text in ("a cat and a big dog on a mat", other)]
    given = {
        "hidden_states": randn(1, 20, 4), "timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(5.0)),
        "pooled_projections": call[0][1],
    }  # fmt: skip

    def forward(index: int) -> torch.Tensor:
        with torch.no_grad():
            return one.transformer(
                **{**given, "hidden_states": given["hidden_states"].clone()}, encoder_hidden_states=call[index][0],
                txt_ids=call[index][2], joint_attention_kwargs={"ip_adapter_image_embeds": [IMAGES]},
            )[0]  # fmt: skip

    expected, found = [forward(0), forward(1)], {0: [], 1: []}
    threads = [threading.Thread(target=lambda i=i: found[i].extend(forward(i) for _ in range(5))) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert differs(*expected)
    for index in (0, 1):
        assert len(found[index]) == 5 and all(torch.equal(row, expected[index]) for row in found[index])


def test_beside_a_method_of_joint_attention_in_the_single_blocks() -> None:
    pipe = pipeline()
    stock = latents(pipe, IMAGES)
    attn_plugins.patch(pipe, "mip", **TWO)
    with pytest.raises(ValueError, match="transformer_blocks.0.attn.* is held by method 'mip'"):
        attn_plugins.patch(pipe, "gna", **SMALL)
    merged = latents(pipe, IMAGES)
    attn_plugins.patch(pipe, "gna", layers="single_transformer_blocks", **SMALL)
    assert differs(latents(pipe, IMAGES), merged)
    attn_plugins.unpatch(pipe, "gna")
    assert torch.equal(latents(pipe, IMAGES), merged)
    attn_plugins.unpatch(pipe)
    assert torch.equal(latents(pipe, IMAGES), stock)


def test_a_lora_is_in_the_phrases_too_and_fused_projections_are_the_same() -> None:
    peft = pytest.importorskip("peft")
    pipe = pipeline()
    attn_plugins.patch(pipe, "mip", **TWO)
    plain = latents(pipe, IMAGES)
    pipe.transformer.fuse_qkv_projections()
    close(latents(pipe, IMAGES), plain)
    pipe.transformer.unfuse_qkv_projections()
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["attn.add_k_proj"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name="one")
    strong = latents(pipe, IMAGES)
    assert differs(strong, plain)
    pipe.transformer.disable_adapters()
    close(latents(pipe, IMAGES), plain)


@pytest.mark.parametrize("how", ["model", "blocks"])
def test_one_graph(how: str) -> None:
    """One for the prompt, one for the negative prompt; blocks share them."""
    torch._dynamo.reset()
    pipe = pipeline(double_blocks=1 if how == "model" else 3)
    attn_plugins.patch(pipe, "mip", **TWO)
    call = {**GUIDED, "steps": 1}
    expected = latents(pipe, IMAGES, **call)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    model = pipe.transformer
    for part in [model] if how == "model" else [*model.transformer_blocks, *model.single_transformer_blocks]:
        part.compile(fullgraph=True, backend=backend)
    close(latents(pipe, IMAGES, **call), expected)
    assert 0 < len(graphs) <= (2 if how == "model" else 4)
    torch._dynamo.reset()


def test_training_reaches_the_adapter_and_not_the_relevance() -> None:
    """Gradients of to_k_ip and to_v_ip, under checkpointing as without, where another prompt ran in between."""
    grads = []
    for checkpointed in (False, True):
        pipe = pipeline()
        attn_plugins.patch(pipe, "mip", **TWO)
        model = pipe.transformer.train().requires_grad_(False)
        wanted = {name: p for name, p in model.named_parameters() if "_ip." in name}
        for p in wanted.values():
            p.requires_grad_(True)
        if checkpointed:
            model.enable_gradient_checkpointing()
        losses = []
        with torch.no_grad():
            prompts = [
                pipe.encode_prompt(text, max_sequence_length=32) for text in ("a cat, a big dog", "big dog; cat")
            ]
        for index, (text, pooled, ids) in enumerate(prompts):
            out = model(
                randn(1, 20, 4, seed=index), text, pooled, torch.tensor([0.5]), guidance=torch.tensor([3.5]),
                img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(5.0)), txt_ids=ids,
                joint_attention_kwargs={"ip_adapter_image_embeds": [IMAGES]},
            )[0]  # fmt: skip
            losses.append(out.square().mean())
        losses[0].backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in wanted.values())
        grads.append([p.grad for p in wanted.values()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_offload() -> None:
    accelerate = pytest.importorskip("accelerate")
    pipe = pipeline()
    attn_plugins.patch(pipe, "mip", **TWO)
    expected = latents(pipe, IMAGES)
    accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))
    close(latents(pipe, IMAGES), expected)


def test_an_exception_in_the_middle_leaves_nothing() -> None:
    pipe = pipeline()
    stock = latents(pipe, IMAGES)
    handle = attn_plugins.patch(pipe, "mip", **TWO)
    merged = latents(pipe, IMAGES)
    hook = pipe.transformer.transformer_blocks[1].attn.to_v.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        latents(pipe, IMAGES)
    hook.remove()
    assert torch.equal(latents(pipe, IMAGES), merged)
    handle.remove()
    assert torch.equal(latents(pipe, IMAGES), stock)
