"""Tensor parallelism of transformers and diffusers: each process has some heads of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import attn_plugins
from tests.support.tiny_language import patch, tiny
from tests.support.tiny_models import MODELS, forward
from tests.support.together import together
from tests.support.windowed import Recording

pytest.importorskip("transformers", "5.0", reason="tensor parallelism by DTensor")
pytest.importorskip("diffusers", "0.42", reason="TensorParallelConfig")
IDS = torch.arange(1, 21)[None].repeat(2, 1)


def in_each_process(rank: int, folder: str) -> dict[str, Any]:
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")
    found: dict[str, Any] = {"flux": diffusers_model()}
    with torch.no_grad():
        found["dense"] = model(IDS).logits
        handle = patch(model, 3)
        layer = handle.patches[0].layers[1]
        processor = layer.processor
        layer.processor = recording = Recording(processor)
        found["sparse"] = model(IDS).logits
        call = recording.calls[0][0]
        found["seen"] = {"q": call.q.shape, "first": call.first_head, "all": call.layer_heads}
        layer.processor = processor
        found["told"] = model.generate(IDS, max_new_tokens=4, do_sample=False)
    model(IDS, labels=IDS).loss.backward()
    found["gradient"] = model.model.layers[0].self_attn.q_proj.weight.grad.full_tensor()
    handle.remove()
    with torch.no_grad():
        found["undone"] = model(IDS).logits
    return found


def diffusers_model() -> dict[str, Any]:
    """A setting per head: each process must take its own heads' rows of it."""
    from diffusers import TensorParallelConfig
    from diffusers.hooks import tensor_parallel
    from diffusers.utils import logging

    logging.set_verbosity_error()
    # diffusers names the devices it has tried; nothing in what it does is theirs alone
    tensor_parallel._SUPPORTED_TP_DEVICES = (*tensor_parallel._SUPPORTED_TP_DEVICES, "cpu")
    torch.accelerator.device_count = lambda: 1  # type: ignore[method-assign]  # diffusers divides by it; a CPU has 0
    tiny_flux = MODELS["flux"]
    model, inputs = tiny_flux.build(), tiny_flux.inputs(2, 0)
    dense = forward(model, inputs)
    settings: dict[str, Any] = {"window": 2, "stride": 1, "min_tokens": 0, "dense_steps": 0}
    handle = attn_plugins.patch(model, "gna", per_head=[{"heads": [1], "window": 3}], **settings)
    alone = forward(model, inputs)
    model.enable_parallelism(config=TensorParallelConfig(tp_degree=2))
    both = forward(model, inputs)
    handle.remove()
    with attn_plugins.patched(model, "gna", **settings):
        equal_heads = forward(model, inputs)
    return {
        "dense": dense, "alone": alone, "together": both, "equal heads": equal_heads, "undone": forward(model, inputs),
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds, and two."""
    folder = str(tmp_path_factory.mktemp("llama"))
    model = tiny()
    model.save_pretrained(folder)
    with torch.no_grad():
        dense = model(IDS).logits
        patch(model, 3)
        sparse, told = model(IDS).logits, model.generate(IDS, max_new_tokens=4, do_sample=False)
    model(IDS, labels=IDS).loss.backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    assert Path(folder, "config.json").is_file() and attn_plugins.summary(model)
    return {
        "one": {"dense": dense, "sparse": sparse, "told": told, "gradient": gradient},
        "two": together(in_each_process, folder),
    }


@pytest.mark.parametrize("name", ["dense", "sparse", "told", "gradient"])
def test_two_processes_give_what_one_gives(found: Any, name: str) -> None:
    for rank in range(2):
        torch.testing.assert_close(found["two"][rank][name], found["one"][name], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found["one"]["sparse"], found["one"]["dense"], atol=1e-2)


def test_a_method_is_told_which_heads_it_has(found: Any) -> None:
    for rank in range(2):
        seen = found["two"][rank]["seen"]
        assert seen["q"][1] == 2 and (seen["first"], seen["all"]) == (2 * rank, 4)


def test_the_undo_is_exact(found: Any) -> None:
    for row in found["two"]:
        assert torch.equal(row["undone"], row["dense"])


def test_settings_per_head_are_those_of_the_layers_heads(found: Any) -> None:
    for row in (found["two"][rank]["flux"] for rank in range(2)):
        torch.testing.assert_close(row["together"], row["alone"])
        assert not torch.allclose(row["alone"], row["equal heads"], atol=1e-4)
        torch.testing.assert_close(row["undone"], row["dense"])
