"""Quantised linears: a patch stands behind the projections and does not see what they are made of."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import attn_plugins
from tests.support import tiny_language
from tests.support.beside import FULL, SMALL, traces
from tests.support.tiny_models import MODELS, forward

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Those of the blocks: what comes before them reads its weights' dtype."""
    blocks = {name: module for name, module in model.named_modules() if "block" in name or "layers." in name}
    return {name: module for name, module in blocks.items() if type(module) is nn.Linear}


def by_torch(model: nn.Module) -> None:
    """int8 of PyTorch's own, dynamic: needs no package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, set(linears(model)), dtype=torch.qint8, inplace=True)


def by_torchao(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    names = set(linears(model))
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in names)


def by_bitsandbytes(model: nn.Module) -> None:
    import bitsandbytes

    for name, old in linears(model).items():
        new = bitsandbytes.nn.Linear4bit(
            old.in_features, old.out_features, bias=old.bias is not None, compute_dtype=torch.float32
        )
        new.load_state_dict(old.state_dict())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new.to("cpu"))


WAYS = {"torch": by_torch, "torchao": by_torchao, "bitsandbytes": by_bitsandbytes}


@pytest.fixture(params=WAYS)
def quantise(request: pytest.FixtureRequest) -> Any:
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed: pip install {request.param}")
    return WAYS[request.param]


@pytest.mark.parametrize("family", ["wan", "flux", "sd15"])
def test_denoisers(quantise: Any, family: str) -> None:
    tiny = MODELS[family]
    inputs = tiny.inputs(1, 0)
    check(quantise, tiny.build, functools.partial(forward, inputs=inputs), FULL, SMALL)


def test_a_language_model(quantise: Any) -> None:
    ids, _ = tiny_language.prompt()

    @torch.no_grad()
    def run(model: Any) -> torch.Tensor:
        return model(ids).logits

    check(quantise, tiny_language.tiny, run, {"window": -1}, {"window": 3, "stride": 1}, atol=2e-4)


def check(quantise: Any, build: Any, run: Any, full: dict[str, Any], small: dict[str, Any], atol: float = 2e-5) -> None:
    """Patched before or after; the undo is exact. int8 rounds activations too: a rounding error may become a step of
    the grid, so a full window is compared with a small one's distance."""
    plain = build()
    quantise(plain)
    expected = run(plain)
    assert not torch.allclose(expected, run(build()), atol=atol)
    sparse = []
    for patched_first in (True, False):
        model = build()
        if not patched_first:
            quantise(model)
        handle = attn_plugins.patch(model, "gna", **small)
        if patched_first:
            quantise(model)
        sparse.append(run(model))
        handle.remove()
        assert torch.equal(run(model), expected) and not traces(model)
        with attn_plugins.patched(model, "gna", **full):
            away = (run(model) - expected).abs().max()
        assert away <= 0.02 * (sparse[0] - expected).abs().max()
    assert torch.equal(sparse[0], sparse[1])
