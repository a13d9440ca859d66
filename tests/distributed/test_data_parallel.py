"""Training scripts: FSDP2 and DDP around a patched model, and a patch inside of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import attn_plugins
from tests.support import tiny_language
from tests.support.tiny_models import MODELS
from tests.support.together import together

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
IDS = torch.arange(1, 41).reshape(2, 20)
GNA: dict[str, Any] = {"window": 2, "stride": 1, "min_tokens": 0, "dense_steps": 0}


def in_each_process(rank: int) -> dict[str, Any]:
    torch.accelerator.device_count = lambda: 1  # type: ignore[method-assign]
    return {
        "llama, patched before": sharded_language(rank, "before"),
        "llama, patched after": sharded_language(rank, "after"),
        "llama, patched before, checkpointing": sharded_language(rank, "before", checkpointing=True),
        "wan, FSDP2": video(rank, "fsdp"),
        "wan, DDP": video(rank, "ddp"),
    }


def step(model: Any, loss: Any) -> list[torch.Tensor]:
    """Parameters after one step of gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss().backward()
    optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def sharded_language(rank: int, order: str, checkpointing: bool = False) -> dict[str, Any]:
    """Each process has one item of the batch; the loss is the mean over both."""
    alone = tiny_language.tiny()
    model = copy.deepcopy(alone)
    if checkpointing:
        model.gradient_checkpointing_enable()
    tiny_language.patch(alone, 3)
    one = step(alone, lambda: alone(IDS, labels=IDS).loss)
    if order == "before":
        handle = tiny_language.patch(model, 3)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    if order == "after":
        handle = tiny_language.patch(model, 3)
    mine = IDS[rank : rank + 1]
    two = step(model, lambda: model(mine, labels=mine).loss)
    with torch.no_grad():
        sparse = model(mine).logits
        handle.remove()
        dense = model(mine).logits
        attn_plugins.unpatch(alone)
        plain = alone(mine).logits
    return {"one": one, "two": two, "sparse": sparse, "dense": dense, "plain": plain}


def video(rank: int, way: str) -> dict[str, Any]:
    tiny = MODELS["wan"]
    alone, inputs = tiny.build(), tiny.inputs(2, 0)
    model = copy.deepcopy(alone)
    attn_plugins.patch(alone, "gna", **GNA)
    one = step(alone, lambda: alone(**inputs, return_dict=False)[0].square().mean())
    mine = {key: value[rank : rank + 1] for key, value in inputs.items()}
    if way == "fsdp":
        for block in model.blocks:
            fully_shard(block)
        wrapped = fully_shard(model)
    else:
        wrapped = DistributedDataParallel(model)
    handle = attn_plugins.patch(wrapped, "gna", **GNA)
    two = step(wrapped, lambda: wrapped(**mine, return_dict=False)[0].square().mean())
    with torch.no_grad():
        sparse = wrapped(**mine, return_dict=False)[0]
        handle.remove()
        dense = wrapped(**mine, return_dict=False)[0]
        attn_plugins.unpatch(alone)
        plain = alone(**mine, return_dict=False)[0]
    return {"one": one, "two": two, "sparse": sparse, "dense": dense, "plain": plain}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return together(in_each_process)


CASES = [
    "llama, patched before",
    "llama, patched after",
    "llama, patched before, checkpointing",
    "wan, FSDP2",
    "wan, DDP",
]


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_one_process(found: Any, name: str) -> None:
    for row in (found[rank][name] for rank in range(2)):
        torch.testing.assert_close(row["two"], row["one"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_patch_works_and_goes(found: Any, name: str) -> None:
    for row in (found[rank][name] for rank in range(2)):
        assert not torch.allclose(row["sparse"], row["dense"], atol=1e-4)
        torch.testing.assert_close(row["dense"], row["plain"], atol=1e-4, rtol=1e-4)
