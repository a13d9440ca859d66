"""Gradient checkpointing: the recomputation sees the grid and step of its own forward."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.utils.checkpoint

import attn_plugins
from tests.support.matrix import ON_GRID
from tests.support.tiny import output
from tests.support.tiny_models import MODELS
from tests.support.windowed import Windowed

pytestmark = pytest.mark.usefixtures("quiet_diffusers")
# they call their checkpointing function with keywords, which it does not take: broken without a patch
CANNOT = {"hunyuan_image", "amused"}
REENTRANT = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)


def gradients(model: Any, *runs: dict[str, Any]) -> list[torch.Tensor]:
    """The parameters' gradients of the summed squares of several forwards, all done before one backward."""
    torch.manual_seed(0)  # some drop labels or activations
    model.zero_grad()
    model.train()
    total = sum(output(model, inputs).square().sum() for inputs in runs)
    total.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", ON_GRID)
def test_gradients_are_those_of_the_plain_model(family: str) -> None:
    tiny = MODELS[family]
    model = tiny.build()
    if not model._supports_gradient_checkpointing:
        with pytest.raises(ValueError, match="does not support gradient checkpointing"):
            model.enable_gradient_checkpointing()
        return
    if family in CANNOT:
        model.enable_gradient_checkpointing()
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            gradients(model, tiny.inputs(1, 0))
        return
    runs = tiny.inputs(2, 0), tiny.inputs(1, 1), tiny.inputs(2, 0)  # other grids come between forward and backward
    attn_plugins.patch(model, Windowed(), min_tokens=0)
    plain = gradients(model, *runs)
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(model, *runs), plain, atol=0, rtol=0)


def test_dense_and_sparse_steps_are_recomputed_as_they_were() -> None:
    tiny = MODELS["wan"]
    model = tiny.build()
    attn_plugins.patch(model, Windowed(), dense_steps=1)
    early, late = ({**tiny.inputs(1, 0), "timestep": torch.tensor([step])} for step in (900, 500))
    plain = gradients(model, early, late)  # 900 after 500 begins a new generation: dense, sparse, dense, sparse
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(model, early, late), plain, atol=0, rtol=0)


def test_without_the_carrier_the_test_above_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_plugins.patches import processor_swap

    monkeypatch.setattr(processor_swap, "carry", lambda modules, state: None)
    tiny = MODELS["wan"]
    model = tiny.build()
    attn_plugins.patch(model, Windowed(), dense_steps=1)
    runs = [{**tiny.inputs(1, 0), "timestep": torch.tensor([step])} for step in (900, 500)]
    model.enable_gradient_checkpointing()
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        gradients(model, *runs)


@pytest.mark.parametrize("order", ["before", "after", "both"])
def test_the_model_gets_its_own_function_back(order: str) -> None:
    model = MODELS["sd15"].build()
    if order != "after":
        model.enable_gradient_checkpointing()
    before = {n: m.__dict__.get("_gradient_checkpointing_func") for n, m in model.named_modules()}
    handle = attn_plugins.patch(model, Windowed(), min_tokens=0)
    if order != "before":
        model.enable_gradient_checkpointing(REENTRANT)
        gradients(model, MODELS["sd15"].inputs(1, 0))  # the hook finds the new function and carries on
    handle.remove()
    for name, module in model.named_modules():
        last_set = REENTRANT if order != "before" and hasattr(module, "gradient_checkpointing") else before[name]
        assert module.__dict__.get("_gradient_checkpointing_func") is last_set


def test_two_patches_share_one_carrier_and_go_in_any_order() -> None:
    model = MODELS["wan"].build()
    model.enable_gradient_checkpointing()
    own = model._gradient_checkpointing_func
    first = attn_plugins.patch(model, Windowed(), layers=0)
    second = attn_plugins.patch(model, Windowed(), layers=1, size=1)
    assert len(model._gradient_checkpointing_func.states) == 2
    first.remove()
    assert len(model._gradient_checkpointing_func.states) == 1
    second.remove()
    assert model._gradient_checkpointing_func is own
