"""Regions taken back: to the bit, from copies, beside other methods; compiled, and trained through."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.methods.regions import RegionMaps
from attn_plugins.metrics import dice_loss
from tests.patches.test_regions import ALL, LEFT, MASKED, NAMES, SOFT, TWO, close, differs, options, patched, pipeline
from tests.support.beside import SMALL, traces
from tests.support.snapshot import snapshot
from tests.support.tiny_models import MODELS, forward
from tests.support.tiny_pipelines import build, run

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")
EMBEDDED = [(LEFT, torch.randn(5, 32)), (SOFT, torch.randn(3, 32))]


def root_of(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


@pytest.mark.parametrize("name", NAMES)
def test_exact_undo(name: str) -> None:
    pipe = pipeline(name)
    with patched(name, **MASKED):
        run(name, pipe)  # what is loaded once, and the library's own hook registry, stay
    plain, before = run(name, pipe), snapshot(root_of(pipe))
    handle = attn_plugins.patch(pipe, "regions", regions=TWO, **options(name, **MASKED))
    assert attn_plugins.patch(pipe, "regions", regions=TWO, **options(name, **MASKED)) is handle
    assert snapshot(root_of(pipe)) != before
    assert differs(run(name, pipe), plain)
    assert "regions" in handle.summary() and "regions" in handle.explain()
    handle.remove()
    assert snapshot(root_of(pipe)) == before and not traces(root_of(pipe))
    assert torch.equal(run(name, pipe), plain)


def test_an_exception_in_the_middle_leaves_a_patch_that_works() -> None:
    pipe = pipeline("sd3")
    plain, block = run("sd3", pipe), pipe.transformer.transformer_blocks[1]

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    attn_plugins.patch(pipe, "regions", regions=TWO, **options("sd3"))
    found, hook = run("sd3", pipe), block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        run("sd3", pipe)
    hook.remove()
    assert torch.equal(run("sd3", pipe), found)
    hook = block.register_forward_pre_hook(lambda *_: attn_plugins.unpatch(pipe) if traces(pipe.transformer) else None)
    run("sd3", pipe)  # a forward that is running ends dense
    hook.remove()
    assert not traces(pipe.transformer)
    assert torch.equal(run("sd3", pipe), plain)


@pytest.mark.parametrize("name", ["sd15", "wan"])
def test_copied_and_pickled_it_is_patched_on_its_own(name: str) -> None:
    pipe = pipeline(name)
    part = "unet" if name == "sd15" else "transformer"
    original, plain = root_of(pipe), run(name, pipe)
    with patched(name, **MASKED):
        found, buffer = run(name, pipe), io.BytesIO()
        torch.save(original, buffer)
        buffer.seek(0)
        twins = [copy.deepcopy(original), torch.load(buffer, weights_only=False)]
    for number, twin in enumerate(twins):
        setattr(pipe, part, twin)
        if number == 0 or name == "wan":  # a pickled model is a bare one: nothing tells it that a batch has halves
            assert torch.equal(run(name, pipe), found)
        attn_plugins.unpatch(twin)
        assert not traces(twin)
        assert torch.equal(run(name, pipe), plain)
    setattr(pipe, part, original)


def test_two_pipelines_do_not_see_each_other() -> None:
    one, two = pipeline("sd15"), build("sd15")
    plain = run("sd15", two)
    with patched("sd15"):
        found = run("sd15", one)
        assert torch.equal(run("sd15", two), plain)
        attn_plugins.patch(two, "regions", regions=[(ALL, "a horse")])
        assert differs(run("sd15", two), found)
        assert torch.equal(run("sd15", one), found)


@pytest.mark.parametrize("regions_first", [True, False])
def test_beside_a_method_of_self_attention(regions_first: bool) -> None:
    pipe = pipeline("sdxl")
    plain = run("sdxl", pipe)
    both = [("regions", {"regions": TWO}), ("gna", SMALL)]
    for method, given in both[:: 1 if regions_first else -1]:
        attn_plugins.patch(pipe, method, **given)
    found = run("sdxl", pipe)
    attn_plugins.unpatch(pipe, "gna")
    alone = run("sdxl", pipe)
    attn_plugins.unpatch(pipe)
    assert differs(found, alone) and differs(alone, plain)
    assert torch.equal(run("sdxl", pipe), plain)


def test_self_attention_may_be_masked_in_some_layers() -> None:
    pipe = pipeline("sdxl")
    where = lambda site: site.kind == "cross" or "up_blocks" in site.name  # noqa: E731
    found = []
    for layers in (None, where):
        with patched("sdxl", **MASKED, layers=layers) as handle:
            found.append(run("sdxl", pipe))
            kinds = [layer.kind for layer in handle.patches[0].layers if "up_blocks" not in layer.name]
            assert ("self" in kinds) == (layers is None)
    assert differs(*found)


def test_one_graph() -> None:
    torch._dynamo.reset()
    tiny = MODELS["wan"]
    model, inputs = tiny.build(), tiny.inputs(1, 0)
    prompts = torch.randn(2, 4, inputs["encoder_hidden_states"].shape[-1])
    attn_plugins.patch(model, "regions", regions=[(LEFT, prompts[0]), (SOFT, prompts[1])], self_attention="masked")
    expected = forward(model, inputs)
    model.compile(fullgraph=True, backend="eager")
    assert close(forward(model, inputs), expected)
    torch._dynamo.reset()


def test_training_goes_through_the_regions_under_checkpointing_as_without() -> None:
    """Gradients of the layers, and of a Dice loss on the recorded maps."""
    grads = []
    for checkpointed in (False, True):
        unet = build("sd15").unet.train()
        handle = attn_plugins.patch(unet, "regions", regions=EMBEDDED, self_attention="masked")
        if checkpointed:
            unet.enable_gradient_checkpointing()
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
        text = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
        out = unet(noise, torch.tensor(10), text).sample
        unet(noise, torch.tensor(11), text[:, :2])  # another call, of another text, comes between
        out.square().mean().backward()
        wanted = [p for name, p in unet.named_parameters() if "attn2.to_k" in name or "attn1.to_q" in name]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in wanted)
        grads.append([p.grad.clone() for p in wanted])
        if not checkpointed:
            unet.zero_grad()
            with RegionMaps(handle, graph=True) as maps:
                unet(noise, torch.tensor(10), text)
            masks = torch.stack([torch.eye(4), 1 - torch.eye(4)])
            dice_loss(maps.mean(), masks).backward()
            assert all(p.grad.abs().sum() > 0 for name, p in unet.named_parameters() if "attn2.to_q" in name)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision() -> None:
    unet = pipeline("sd15").unet
    noise, text = torch.randn(1, 4, 8, 8), torch.randn(1, 6, 32)
    with attn_plugins.patched(unet, "regions", regions=EMBEDDED, self_attention="masked"), torch.no_grad():
        expected = unet(noise, torch.tensor(10), text).sample
        found = copy.deepcopy(unet).bfloat16()(noise.bfloat16(), torch.tensor(10), text.bfloat16()).sample
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("way", ["accelerate", "group"])
def test_offload(way: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    pipe, cpu = build("sdxl"), torch.device("cpu")
    attn_plugins.patch(pipe, "regions", regions=TWO)
    expected = run("sdxl", pipe)
    if way == "accelerate":
        accelerate.cpu_offload(pipe.unet, cpu)
    else:
        pipe.unet.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    assert close(run("sdxl", pipe), expected)


def test_a_recipe_is_the_patch(tmp_path: Any) -> None:
    pipe = pipeline("flux")
    boxes = [(LEFT, "a dog"), ((0.5, 0, 1, 1), "a horse")]
    with patched("flux", boxes, mode="masked") as handle:
        found, path = run("flux", pipe), handle.save(tmp_path / "recipe.yaml")
    with attn_plugins.patched(pipe, path):
        assert torch.equal(run("flux", pipe), found)
