"""LoRA through PEFT: loaded, fused, unfused and deleted, before a patch and after it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import attn_plugins
from tests.support import tiny_language
from tests.support.beside import check_beside, traces
from tests.support.tiny import randn
from tests.support.tiny_models import MODELS, forward
from tests.support.tiny_pipelines import build, run

peft = pytest.importorskip("peft")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")
IDS = torch.arange(1, 21)[None].repeat(2, 1)
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


def randomise(model: torch.nn.Module) -> None:
    """A fresh LoRA is zero."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(0.3 * randn(*parameter.shape, seed=number))


def add(model: Any) -> None:
    torch.manual_seed(5)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=PROJECTIONS), "style")
    randomise(model)


def add_and_fuse(model: Any) -> None:
    add(model)
    model.fuse_lora()


def unfuse_and_delete(model: Any) -> None:
    model.unfuse_lora()
    model.delete_adapters("style")


@pytest.mark.parametrize("family", ["wan", "flux", "sd15"])
@pytest.mark.parametrize("fused", [False, True])
def test_adapters_of_a_model(family: str, fused: bool) -> None:
    tiny = MODELS[family]
    inputs = tiny.inputs(1, 0)
    check_beside(
        tiny.build,
        functools.partial(forward, inputs=inputs),
        add_and_fuse if fused else add,
        unfuse_and_delete if fused else lambda model: model.delete_adapters("style"),
        changes=True,
    )


@pytest.mark.parametrize("name", ["flux", "sd15"])
def test_files_loaded_by_a_pipeline(name: str, tmp_path: Path) -> None:
    donor = build(name)
    part = "unet" if name == "sd15" else "transformer"
    add(getattr(donor, part))
    layers = peft.get_peft_model_state_dict(getattr(donor, part), adapter_name="style")
    type(donor).save_lora_weights(tmp_path, **{f"{part}_lora_layers": layers})

    def load(pipe: Any) -> None:
        pipe.load_lora_weights(tmp_path, adapter_name="style")
        pipe.set_adapters(["style"], [0.7])

    check_beside(
        lambda: build(name), lambda pipe: run(name, pipe), load, lambda pipe: pipe.unload_lora_weights(), changes=True
    )


def wrap(model: Any) -> Any:
    torch.manual_seed(5)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    randomise(lora)
    return lora.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("patched_first", [True, False])
def test_a_language_model_inside_peft(patched_first: bool) -> None:
    plain, model = wrap(tiny_language.tiny()), tiny_language.tiny()
    if patched_first:
        tiny_language.patch(model, -1)
    lora = wrap(model)
    if not patched_first:
        tiny_language.patch(lora, -1)
    torch.testing.assert_close(logits(lora), logits(plain), atol=5e-5, rtol=1e-4)
    with lora.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(logits(lora), logits(plain), atol=5e-5, rtol=1e-4)
    lora.merge_adapter()
    plain.merge_adapter()
    torch.testing.assert_close(logits(lora), logits(plain), atol=5e-5, rtol=1e-4)
    attn_plugins.unpatch(lora)
    assert torch.equal(logits(lora), logits(plain)) and not traces(lora)
    tiny_language.patch(lora, 3)
    lora.unmerge_adapter()
    plain.unmerge_adapter()
    assert not torch.allclose(logits(lora), logits(plain), atol=1e-2)
    merged, other = lora.merge_and_unload(), plain.merge_and_unload()
    assert merged is model
    attn_plugins.unpatch(merged)
    assert torch.equal(logits(merged), logits(other)) and not traces(merged)


def test_training_adapters_of_a_patched_model() -> None:
    """The LoRA's gradients under a full window are those of dense attention, and only adapters get any."""
    grads = []
    for patched in (False, True):
        lora = wrap(tiny_language.tiny())
        if patched:
            tiny_language.patch(lora, -1)
        lora(input_ids=IDS, labels=IDS).loss.backward()
        assert all(("lora_" in name) == (p.grad is not None) for name, p in lora.named_parameters())
        grads.append([p.grad for p in lora.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-4)
