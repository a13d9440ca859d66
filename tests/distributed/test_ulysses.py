"""Ulysses context parallelism of diffusers: two processes with a patched model give what one gives."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.runtime import Refused
from tests.support.tiny_models import MODELS, forward
from tests.support.together import together
from tests.support.windowed import Recording

pytest.importorskip("diffusers", "0.36", reason="context parallelism came with diffusers 0.36")
PER_HEAD = {"per_head": [{"heads": [1], "window": 3}]}
# (family, size of the inputs, changed inputs, options of GNA, options of the configuration)
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "self-attention": ("wan", 0, {}, {}, {}),
    "text before, split by itself": ("flux", 1, {}, {}, {}),
    "prompts of different lengths": ("qwen_image", 1, {}, {}, {}),
    "a model that splits its text for cross-attention": ("ltx_video", 0, {"encoder_attention_mask": None}, {}, {}),
    "a setting per head": ("wan", 0, {}, PER_HEAD, {}),
    "tokens that do not come out even": (
        "wan", 0, {"hidden_states": torch.linspace(-1, 1, 2 * 16 * 3 * 6 * 6).reshape(2, 16, 3, 6, 6)}, {},
        {"ulysses_anything": True},
    ),
}  # fmt: skip


def patch(model: Any, **more: Any) -> attn_plugins.PatchHandle:
    return attn_plugins.patch(model, "gna", **{"window": 2, "stride": 1, "min_tokens": 0, "dense_steps": 0, **more})


def split(model: Any, plan: Any = None, **config: Any) -> None:
    from diffusers import ContextParallelConfig

    torch.accelerator.device_count = lambda: 1  # type: ignore[method-assign]  # diffusers divides by it; a CPU has 0
    model.enable_parallelism(config=ContextParallelConfig(**{"ulysses_degree": 2, **config}), cp_plan=plan)


def gather_uneven(tensor: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """In diffusers' place: its gather of stretches of different lengths asks for what NCCL can and gloo cannot."""
    rows: list[Any] = [None, None]
    torch.distributed.all_gather_object(rows, tensor, group=group)
    return torch.cat(rows, dim=dim)


def in_each_process(rank: int) -> dict[str, Any]:
    from diffusers.hooks import context_parallel
    from diffusers.utils import logging

    logging.set_verbosity_error()
    context_parallel._all_gather_anything = gather_uneven
    found: dict[str, Any] = {name: alone_and_together(*case) for name, case in CASES.items()}
    found["dense steps"] = dense_steps()
    found["gradients"] = gradients()
    found["ring"] = refusal(ring_degree=2, ulysses_degree=1)
    found["cp_plan"] = own_plan()
    found["graph"] = compiled()
    return found


def alone_and_together(
    family: str, size: int, changed: dict[str, Any], options: dict[str, Any], config: dict[str, Any]
) -> dict[str, Any]:
    tiny = MODELS[family]
    model, inputs = tiny.build(), {**tiny.inputs(2, size), **changed}
    dense = forward(model, inputs)
    handle = patch(model, **options)
    alone = forward(model, inputs)
    split(model, **config)
    layer = handle.patches[0].layers[0]
    layer.processor = recording = Recording(layer.processor)
    both = forward(model, inputs)
    handle.remove()
    return {
        "dense": dense, "alone": alone, "together": both, "undone": forward(model, inputs),
        "seen": recording.calls[0][0].q.shape, "all heads": recording.calls[0][0].layer_heads,
        "tokens": recording.calls[0][0].sequence.length,
    }  # fmt: skip


def dense_steps() -> dict[str, Any]:
    tiny = MODELS["wan"]
    model, runs = tiny.build(), [{**tiny.inputs(1, 0), "timestep": torch.tensor([step])} for step in (900, 500)]
    patch(model, dense_steps=1)
    alone = [forward(model, inputs) for inputs in runs]
    split(model)
    return {"alone": alone, "together": [forward(model, inputs) for inputs in runs]}


def gradients() -> dict[str, Any]:
    """The loss is the same on both: each gets the part of the gradients that its tokens have in it."""
    tiny = MODELS["flux"]
    model, inputs = tiny.build(), tiny.inputs(1, 1)
    patch(model)
    rows = []
    for parallel in (False, True):
        if parallel:
            split(model)
        model.zero_grad()
        model(**inputs, return_dict=False)[0].square().sum().backward()
        grads = [p.grad for name, p in model.named_parameters() if "to_" in name or "add_" in name]
        if parallel:
            for grad in grads:
                torch.distributed.all_reduce(grad)
        rows.append([grad.clone() for grad in grads])
    return {"alone": rows[0], "together": rows[1]}


def refusal(**config: Any) -> str:
    model = MODELS["wan"].build()
    patch(model, strict=True)
    split(model, **config)
    with pytest.raises(Refused) as error:
        forward(model, MODELS["wan"].inputs(1, 0))
    return str(error.value)


def own_plan() -> dict[str, Any]:
    """A plan of one's own for a model whose class has none."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    tiny = MODELS["wan"]
    model, inputs = tiny.build(), tiny.inputs(1, 0)
    dense = forward(model, inputs)
    patch(model)
    stretch = ContextParallelInput(split_dim=1, split_output=False)
    both = ContextParallelInput(split_dim=1, split_output=True)
    plan = {"rope": {0: both, 1: both}, "blocks.0": {"hidden_states": stretch}, "proj_out": ContextParallelOutput(1)}
    split(model, plan)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = forward(model, inputs)
    return {"dense": dense, "out": out, "said": [str(row.message) for row in said]}


def compiled() -> dict[str, Any]:
    tiny = MODELS["wan"]
    model, inputs = tiny.build(), tiny.inputs(1, 0)
    patch(model)
    split(model)
    eager = forward(model, inputs)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    return {"eager": eager, "compiled": forward(model, inputs)}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return together(in_each_process)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(found: Any, name: str) -> None:
    for rank in range(2):
        row = found[rank][name]
        assert not torch.allclose(row["alone"], row["dense"], atol=1e-4)
        torch.testing.assert_close(row["together"], row["alone"])
        torch.testing.assert_close(row["undone"], row["dense"])
        assert torch.equal(row["together"], found[0][name]["together"])


@pytest.mark.parametrize("name", CASES)
def test_methods_see_all_tokens_and_some_heads(found: Any, name: str) -> None:
    for row in (found[rank][name] for rank in range(2)):
        batch, heads, tokens, _ = row["seen"]
        assert (batch, 2 * heads, tokens) == (2, row["all heads"], row["tokens"])


def test_dense_steps_are_dense(found: Any) -> None:
    for row in (found[rank]["dense steps"] for rank in range(2)):
        torch.testing.assert_close(row["together"], row["alone"])


def test_gradients_add_up(found: Any) -> None:
    for row in (found[rank]["gradients"] for rank in range(2)):
        torch.testing.assert_close(row["together"], row["alone"], atol=1e-5, rtol=1e-4)


def test_ring_attention_is_refused(found: Any) -> None:
    for row in found:
        assert "ring attention shows a method a part of the keys" in row["ring"] and "ulysses_degree" in row["ring"]


def test_a_plan_of_ones_own_stays_dense(found: Any) -> None:
    for row in (found[rank]["cp_plan"] for rank in range(2)):
        assert [line for line in row["said"] if "cp_plan of your own" in line]
        torch.testing.assert_close(row["out"], row["dense"])


def test_compiled_blocks_talk_to_each_other(found: Any) -> None:
    for row in (found[rank]["graph"] for rank in range(2)):
        torch.testing.assert_close(row["compiled"], row["eager"])
