"""Agents and pooled keys in whole models: what stays dense bit by bit, which levels and steps they take, precisions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.report import analyse, explain
from tests.support.tiny import randn
from tests.support.tiny_models import MODELS, forward
from tests.support.tiny_pipelines import build, run
from tests.support.windowed import Recording

pytestmark = pytest.mark.usefixtures("quiet_diffusers")
NOW: dict[str, Any] = {"min_tokens": 0, "dense_steps": 0}


def record(handle: attn_plugins.PatchHandle) -> Recording:
    """What the patched layers are called with, all of them in one list."""
    recording = Recording(handle.patches[0].layers[0].processor)
    for layer in handle.patches[0].layers:
        layer.processor = recording
    return recording


@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart", "sd3", "flux", "wan"])
def test_agents_for_half_the_tokens_change_no_bit(family: str) -> None:
    model, inputs = MODELS[family].build(), MODELS[family].inputs(2, 0)
    dense = forward(model, inputs)
    attn_plugins.patch(model, "agent", ratio=0.5, **NOW)
    with pytest.warns(UserWarning, match="cost no less than dense attention"):
        assert torch.equal(forward(model, inputs), dense)


def sdxl_inputs(height: int, width: int) -> dict[str, Any]:
    return {**MODELS["sdxl"].inputs(1, 0), "sample": randn(1, 4, height, width)}


@pytest.mark.parametrize("method", ["agent", "kv_pool"])
def test_sdxl_with_the_defaults_takes_the_levels_that_are_long_enough(method: str) -> None:
    model = MODELS["sdxl"].build()  # its attention is at half the size of its input
    long, short = sdxl_inputs(64, 72), sdxl_inputs(48, 40)
    dense = forward(model, long), forward(model, short)
    handle = attn_plugins.patch(model, method)
    assert handle.patches[0].state.min_tokens == (1024, 2048)
    assert "fewer than 1024 tokens on a CPU, 2048 elsewhere" in handle.explain()
    assert not torch.equal(forward(model, long), dense[0])
    assert torch.equal(forward(model, short), dense[1])
    with pytest.warns(UserWarning, match="no grid of the last forward had min_tokens=1024 tokens, the largest 480"):
        forward(model, short)


def test_the_first_steps_have_agents_and_the_last_are_plain() -> None:
    pipe = build("sd15")
    dense = run("sd15", pipe, steps=5)
    handle = attn_plugins.patch(pipe, "agent", min_tokens=0, ratio=0.2, dense_steps=(0, 0.6))
    recording = record(handle)
    seen: list[int] = []
    run("sd15", pipe, steps=5, callback_on_step_end=lambda *args: seen.append(len(recording.calls)) or {})
    layers = len(handle.patches[0].layers)
    assert seen == [layers, 2 * layers, *[2 * layers] * 3]
    assert recording.calls[0][0].q.shape[0] == 2  # with and without the prompt, in one batch
    assert "dense: the last 60% of the steps" in handle.summary() and "dense for the last 60%" in handle.explain()
    handle.remove()
    assert torch.equal(run("sd15", pipe, steps=5), dense)


def test_a_recipe_keeps_schedule_and_minimum(tmp_path: Any) -> None:
    pipe = build("sd15")
    handle = attn_plugins.patch(pipe, "agent", agents=(2, 2), dense_steps=(0.2, 0.4), min_tokens=(8, 16))
    path = handle.save(tmp_path / "agents.yaml")
    handle.remove()
    again = attn_plugins.patch(pipe, path)
    state = again.patches[0].state
    assert (state.schedule.dense_steps, state.min_tokens) == ((0.2, 0.4), (8, 16))
    assert again.patches[0].config == handle.patches[0].config
    assert attn_plugins.patch(pipe, path) is again


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["sd15", "flux", "wan"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    """Agents of the model's precision, and an output as near to float32's as the dense model's is, twice."""
    tiny = MODELS[family]
    inputs = tiny.inputs(1, 0)
    halves = {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    errors = {}
    for method in (None, "agent", "kv_pool"):
        model = tiny.build()
        if method is not None:
            attn_plugins.patch(model, method, strict=True, **NOW, **{"agent": {"ratio": 0.2}, "kv_pool": {}}[method])
        exact = forward(model, inputs)
        found = forward(model.to(dtype), halves)
        assert found.dtype == dtype
        errors[method] = float((found.float() - exact).abs().max())
    assert errors["agent"] <= 2 * errors[None] and errors["kv_pool"] <= 2 * errors[None]


def test_a_compiled_model_with_caught_queries_is_one_graph() -> None:
    tiny = MODELS["flux"]
    model, inputs = tiny.build(), tiny.inputs(2, 0)
    dense = forward(model, inputs)
    handle = attn_plugins.patch(model, "agent", ratio=0.2, **NOW)
    eager = forward(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forward(compiled, inputs), eager)
    torch.testing.assert_close(forward(compiled, inputs), eager)
    handle.remove()
    torch.testing.assert_close(forward(compiled, inputs), dense)
    torch._dynamo.reset()


def test_gradients_reach_the_weights_through_the_agents() -> None:
    """Where norm and projection see the means, their gradients do too, and checkpointing changes none."""
    grads = []
    for checkpointing in (False, True):
        model, inputs = MODELS["flux"].build().train(), MODELS["flux"].inputs(1, 0)
        attn_plugins.patch(model, "agent", ratio=0.2, **NOW)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs, return_dict=False)[0].square().sum().backward()
        grads.append([block.attn.norm_q.weight.grad for block in model.transformer_blocks])
    assert all(grad.abs().sum() > 0 for grad in grads[0])
    torch.testing.assert_close(grads[1], grads[0])


def test_the_bound_of_a_summary_is_amdahls_law_on_the_cost() -> None:
    """18 of 30 steps stay dense; of the others the sites' share of the FLOPs costs what the processor says."""
    model = MODELS["flux"].build()
    handle = attn_plugins.patch(model, "agent", ratio=0.2, min_tokens=0, dense_steps=(0, 0.6), num_steps=30)
    forward(model, {**MODELS["flux"].inputs(1, 0), "timestep": torch.tensor([1.0])})
    (report,) = analyse(handle)
    cost = handle.patches[0].layers[0].processor.density(report.sequence)
    assert report.saved == pytest.approx(1 - cost)
    bound = 1 / (1 - report.share * 0.4 * (1 - cost))
    assert f"at this cost at most {bound:.2f}x" in handle.summary() and f"cost {cost:.1%}" in explain(handle)
