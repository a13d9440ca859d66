"""MIP taken back: with the adapter loaded, unloaded, loaded again; copied, pickled, saved, compiled, beside others."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import attn_plugins
from tests.patches.test_mip import NAMES, TWO, close, differs, latents, pipeline
from tests.support.beside import SMALL, traces
from tests.support.ip_adapters import checkpoint, embeds, load
from tests.support.snapshot import snapshot
from tests.support.tiny_pipelines import build, run

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def unet_state(pipe: Any) -> Any:
    return snapshot(pipe.unet)


@pytest.mark.parametrize("name", NAMES)
def test_exact_undo(name: str) -> None:
    pipe, images = pipeline(name), embeds(1, 2)
    attn_plugins.patch(pipe, "mip", **TWO).remove()  # what is loaded once stays
    stock, before = latents(pipe, name, images), unet_state(pipe)
    handle = attn_plugins.patch(pipe, "mip", **TWO)
    assert attn_plugins.patch(pipe, "mip", **TWO) is handle and unet_state(pipe) != before
    assert differs(latents(pipe, name, images), stock)
    assert "mip" in handle.summary() and "attn2: cross, mip" in handle.explain()
    attn_plugins.unpatch(pipe)
    assert unet_state(pipe) == before
    assert torch.equal(latents(pipe, name, images), stock)


@pytest.mark.parametrize("unpatched_first", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_unpatch_and_unload_in_either_order(name: str, unpatched_first: bool) -> None:
    pipe = build(name)
    plain = run(name, pipe)
    load(pipe, checkpoint(pipe.unet))
    stock = latents(pipe, name, embeds(1, 2))
    handle = attn_plugins.patch(pipe, "mip", **TWO)
    latents(pipe, name, embeds(1, 2))
    if unpatched_first:
        handle.remove()
        assert torch.equal(latents(pipe, name, embeds(1, 2)), stock)
    pipe.unload_ip_adapter()
    if not unpatched_first:
        with pytest.warns(UserWarning, match="the IP-Adapter was unloaded: call pipe.load_ip_adapter"):
            assert torch.equal(run(name, pipe), plain)
        handle.remove()
    assert torch.equal(run(name, pipe), plain)
    assert not traces(pipe.unet)
    load(pipe, checkpoint(pipe.unet))
    assert torch.equal(latents(pipe, name, embeds(1, 2)), stock)


@pytest.mark.parametrize("unloaded", [True, False])
def test_loaded_again_it_is_merged_again(unloaded: bool) -> None:
    pipe, images = pipeline("sdxl"), embeds(1, 2)
    handle = attn_plugins.patch(pipe, "mip", **TWO)
    merged = latents(pipe, "sdxl", images)
    if unloaded:
        pipe.unload_ip_adapter()
    load(pipe, checkpoint(pipe.unet))
    assert torch.equal(latents(pipe, "sdxl", images), merged)
    load(pipe, checkpoint(pipe.unet, seed=7))
    assert differs(latents(pipe, "sdxl", images), merged)
    handle.remove()
    assert not traces(pipe.unet)


def test_what_was_replaced_meanwhile_gets_its_class_back() -> None:
    """Fusing keeps the old processors and puts them back."""
    pipe, images = pipeline("sdxl"), embeds(1, 2)
    stock = latents(pipe, "sdxl", images)
    handle = attn_plugins.patch(pipe, "mip", **TWO)
    pipe.unet.fuse_qkv_projections()
    handle.remove()
    pipe.unet.unfuse_qkv_projections()
    assert torch.equal(latents(pipe, "sdxl", images), stock)
    assert not traces(pipe.unet)


def test_saving_saves_the_model(tmp_path: Any) -> None:
    pipe = pipeline("sd15")
    keys = list(pipe.unet.state_dict())
    attn_plugins.patch(pipe, "mip", **TWO)
    assert list(pipe.unet.state_dict()) == keys
    pipe.unet.save_pretrained(tmp_path)
    assert "attn_plugins" not in (tmp_path / "config.json").read_text()


def test_copied_and_pickled_it_is_patched_on_its_own() -> None:
    pipe, images = pipeline("sd15"), embeds(1, 2)
    stock = latents(pipe, "sd15", images)
    handle = attn_plugins.patch(pipe, "mip", **TWO)
    merged = latents(pipe, "sd15", images)
    buffer = io.BytesIO()
    torch.save(pipe.unet, buffer)
    buffer.seek(0)
    original = pipe.unet
    for twin in (copy.deepcopy(original), torch.load(buffer, weights_only=False)):
        pipe.unet = twin
        assert torch.equal(latents(pipe, "sd15", images), merged)
        attn_plugins.unpatch(twin)
        assert not traces(twin)
        assert torch.equal(latents(pipe, "sd15", images), stock)
    pipe.unet = original
    assert torch.equal(latents(pipe, "sd15", images), merged)
    handle.remove()


def test_two_pipelines_do_not_see_each_other() -> None:
    one, two, images = pipeline("sd15"), pipeline("sd15"), embeds(1, 2)
    stock = latents(two, "sd15", images)
    attn_plugins.patch(one, "mip", **TWO)
    merged = latents(one, "sd15", images)
    assert torch.equal(latents(two, "sd15", images), stock)
    attn_plugins.patch(two, "mip", phrases=["dog", "hat"])
    latents(two, "sd15", images)
    assert torch.equal(latents(one, "sd15", images), merged)


@pytest.mark.parametrize("mip_first", [True, False])
def test_beside_a_method_of_self_attention(mip_first: bool) -> None:
    pipe, images = pipeline("sdxl"), embeds(1, 2)
    stock = latents(pipe, "sdxl", images)
    for method, options in [("mip", TWO), ("gna", SMALL)][:: 1 if mip_first else -1]:
        attn_plugins.patch(pipe, method, **options)
    both = latents(pipe, "sdxl", images)
    attn_plugins.unpatch(pipe, "gna")
    merged = latents(pipe, "sdxl", images)
    assert differs(both, merged) and differs(merged, stock)
    attn_plugins.unpatch(pipe)
    assert torch.equal(latents(pipe, "sdxl", images), stock)


def test_a_lora_on_the_text_projection_is_in_the_phrases_too() -> None:
    peft = pytest.importorskip("peft")
    pipe, images = pipeline("sd15"), embeds(1, 2)
    attn_plugins.patch(pipe, "mip", **TWO)
    plain = latents(pipe, "sd15", images)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["attn2.to_k"], init_lora_weights=False)
    pipe.unet.add_adapter(config, adapter_name="one")
    strong = latents(pipe, "sd15", images)
    assert differs(strong, plain)
    pipe.unet.disable_adapters()
    close(latents(pipe, "sd15", images), plain)
    pipe.unet.enable_adapters()
    assert torch.equal(latents(pipe, "sd15", images), strong)


def test_one_graph() -> None:
    torch._dynamo.reset()
    pipe, images = pipeline("sdxl"), embeds(1, 2)
    attn_plugins.patch(pipe, "mip", **TWO)
    expected = latents(pipe, "sdxl", images)
    pipe.unet.compile(fullgraph=True, backend="aot_eager")
    close(latents(pipe, "sdxl", images), expected)
    attn_plugins.unpatch(pipe)
    stock = latents(pipeline("sdxl"), "sdxl", images)
    close(latents(pipe, "sdxl", images), stock)
    torch._dynamo.reset()


def test_training_reaches_the_adapter_and_not_the_relevance() -> None:
    """Gradients of to_k_ip and to_v_ip, under checkpointing as without."""
    grads = []
    for checkpointed in (False, True):
        pipe = pipeline("sd15")
        attn_plugins.patch(pipe, "mip", **TWO)
        unet = pipe.unet.train().requires_grad_(False)
        wanted = {name: p for name, p in unet.named_parameters() if "_ip." in name}
        for p in wanted.values():
            p.requires_grad_(True)
        if checkpointed:
            unet.enable_gradient_checkpointing()
        text = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
        given = {"image_embeds": [embeds(1, 2, guided=False).repeat(2, 1, 1)]}
        unet(noise, torch.tensor(10), text, added_cond_kwargs=given).sample.square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in wanted.values())
        grads.append([p.grad for p in wanted.values()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_blocks_that_are_compiled_one_by_one_share_graphs() -> None:
    torch._dynamo.reset()
    pipe, images = pipeline("sdxl"), embeds(1, 2)
    attn_plugins.patch(pipe, "mip", **TWO)
    expected = latents(pipe, "sdxl", images)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    blocks = [block for block in pipe.unet.modules() if type(block).__name__ == "BasicTransformerBlock"]
    for block in blocks:
        block.compile(fullgraph=True, backend=backend)
    close(latents(pipe, "sdxl", images), expected)
    assert 0 < len(graphs) < len(blocks) // 2
    torch._dynamo.reset()


@pytest.mark.parametrize("way", ["accelerate", "group"])
def test_offload(way: str) -> None:
    """Weights that are elsewhere between the layers' calls: phrase keys are made where the layer runs."""
    accelerate = pytest.importorskip("accelerate")
    pipe, images, cpu = pipeline("sdxl"), embeds(1, 2), torch.device("cpu")
    attn_plugins.patch(pipe, "mip", **TWO)
    expected = latents(pipe, "sdxl", images)
    if way == "accelerate":
        accelerate.cpu_offload(pipe.unet, cpu)
    else:
        pipe.unet.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    close(latents(pipe, "sdxl", images), expected)


def test_backends_agree() -> None:
    pipe, images = pipeline("sd15"), embeds(1, 2)
    with attn_plugins.patched(pipe, "mip", backend="reference", **TWO):
        expected = latents(pipe, "sd15", images)
    attn_plugins.patch(pipe, "mip", backend="cpu", **TWO)
    close(latents(pipe, "sd15", images), expected)
