"""Where weights lie and in which dtype: offload, layerwise casting, device maps. On a CPU all devices are the CPU."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import attn_plugins
from tests.support import tiny_language
from tests.support.beside import FULL, SMALL, check_beside, traces
from tests.support.tiny_models import MODELS, forward
from tests.support.tiny_pipelines import build, run

diffusers = pytest.importorskip("diffusers")
accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")
CPU = torch.device("cpu")


def remove_hooks(pipe: Any) -> None:
    pipe.remove_all_hooks()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(CPU)


@pytest.mark.parametrize("name", ["wan", "flux", "sd15"])
@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_cpu_offload(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # diffusers wants an accelerator to offload from; accelerate's hooks, which do the work, take any device
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cuda")
    offload = accelerate.cpu_offload  # for which the "cpu:0" that diffusers makes of a CPU is another device
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, _, **more: offload(model, CPU, **more))
    check_beside(
        lambda: build(name), lambda pipe: run(name, pipe), lambda pipe: getattr(pipe, way)(device=CPU), remove_hooks
    )


@pytest.mark.parametrize("family", ["wan", "flux", "sd15", "ltx_video"])
def test_hooks_of_accelerate_on_a_model(family: str) -> None:
    tiny = MODELS[family]
    check_beside(
        tiny.build,
        functools.partial(forward, inputs=tiny.inputs(1, 0)),
        lambda model: accelerate.cpu_offload(model, CPU),
        lambda model: accelerate.hooks.remove_hook_from_submodules(model),
    )


@pytest.mark.parametrize("family", ["wan", "flux", "sd15"])
@pytest.mark.parametrize("way", ["leaf_level", "block_level"])
def test_group_offload(family: str, way: str) -> None:
    """diffusers has no way back from group offload but to remove its hooks."""
    tiny = MODELS[family]
    blocks = {"num_blocks_per_group": 1} if way == "block_level" else {}

    def offload(model: Any) -> None:
        model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=way, **blocks)

    def back(model: Any) -> None:
        for module in model.modules():
            registry = getattr(module, "_diffusers_hook", None)
            for name in list(registry.hooks) if registry else ():
                registry.remove_hook(name, recurse=False)

    check_beside(tiny.build, functools.partial(forward, inputs=tiny.inputs(1, 0)), offload, back)


@pytest.mark.parametrize("family", ["wan", "flux", "sd15"])
def test_layerwise_casting(family: str) -> None:
    """Weights rest in float8 and are cast up for each call: patched or not, the same weights."""
    tiny = MODELS[family]
    inputs = tiny.inputs(1, 0)

    def cast(model: Any) -> Any:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        return model

    plain = forward(cast(tiny.build()), inputs)
    assert not torch.allclose(plain, forward(tiny.build(), inputs), atol=1e-4)
    sparse = []
    for patched_first in (True, False):
        model = tiny.build()
        if not patched_first:
            cast(model)
        handle = attn_plugins.patch(model, "gna", **SMALL)
        if patched_first:
            cast(model)
        sparse.append(forward(model, inputs))
        handle.remove()
        assert torch.equal(forward(model, inputs), plain) and not traces(model)
        with attn_plugins.patched(model, "gna", **FULL):
            torch.testing.assert_close(forward(model, inputs), plain, atol=2e-5, rtol=1e-4)
    assert torch.equal(sparse[0], sparse[1]) and not torch.allclose(sparse[0], plain, atol=1e-4)


@pytest.mark.parametrize("patched_first", [True, False])
def test_a_device_map_of_a_language_model(patched_first: bool, tmp_path: Path) -> None:
    """Some layers on the disk: accelerate loads them for each call."""
    import transformers

    plain = tiny_language.tiny()
    plain.save_pretrained(tmp_path / "model")
    ids, _ = tiny_language.prompt()
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
             "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    if patched_first:
        model = tiny_language.tiny()
        handle = tiny_language.patch(model, 3)
        accelerate.dispatch_model(model, parts, offload_dir=str(tmp_path), main_device="cpu", force_hooks=True)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=parts, offload_folder=str(tmp_path)
        )
        handle = tiny_language.patch(model, 3)
    tiny_language.patch(plain, 3)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
        handle.remove()
        attn_plugins.unpatch(plain)
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_a_device_map_of_a_denoiser(tmp_path: Path) -> None:
    tiny = MODELS["wan"]
    plain, inputs = tiny.build(), tiny.inputs(1, 0)
    plain.save_pretrained(tmp_path)
    model = type(plain).from_pretrained(tmp_path, device_map={"": "cpu"})
    dense = forward(model, inputs)
    with attn_plugins.patched(plain, "gna", **SMALL), attn_plugins.patched(model, "gna", **SMALL):
        torch.testing.assert_close(forward(model, inputs), forward(plain, inputs))
    assert torch.equal(forward(model, inputs), dense)
