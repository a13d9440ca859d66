"""A backend chosen after a patch: it serves the dense calls, the method keeps its own, and `explain` says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attn_plugins
from tests.support import tiny_language
from tests.support.beside import SMALL
from tests.support.tiny_models import MODELS, forward

pytest.importorskip("diffusers", "0.36", reason="attention backends of diffusers")
from diffusers.models import attention_dispatch

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


@pytest.fixture
def default_backend() -> Iterator[None]:
    """`set_attention_backend` also sets the backend of the whole process; `reset_attention_backend` does not."""
    before, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    yield
    attention_dispatch._AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.parametrize("family", ["wan", "flux", "ltx_video"])
def test_a_backend_of_diffusers(family: str, default_backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = MODELS[family]
    model, inputs = tiny.build(), tiny.inputs(1, 0)
    handle = attn_plugins.patch(model, "gna", **{**SMALL, "dense_steps": 1})
    steps = (inputs["timestep"], inputs["timestep"] / 2)
    early, late = ({**inputs, "timestep": step} for step in steps)
    dense, sparse = forward(model, early), forward(model, late)
    assert "dense calls run" not in handle.explain()
    model.set_attention_backend("_native_math")
    assert "dense calls run '_native_math', calls of the method do not" in handle.explain()

    seen: list[str] = []
    original = attention_dispatch.dispatch_attention_fn

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(str(getattr(kwargs["backend"], "value", kwargs["backend"])))
        return original(*args, **kwargs)

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", spy)
    torch.testing.assert_close(forward(model, early), dense)
    patched = len(handle.patches[0].layers)
    assert seen.count("_native_math") == len(seen) >= patched
    in_dense_step = len(seen)
    torch.testing.assert_close(forward(model, late), sparse)
    assert len(seen) == 2 * in_dense_step - patched
    model.reset_attention_backend()
    assert "dense calls run" not in handle.explain()


def test_an_implementation_of_transformers() -> None:
    model = tiny_language.tiny()
    ids, _ = tiny_language.prompt()
    handle = tiny_language.patch(model, 3)
    with torch.no_grad():
        sparse = model(ids).logits
        model.set_attn_implementation("eager")
        assert torch.equal(model(ids).logits, sparse)
    assert "dense calls run 'eager', calls of the method do not" in handle.explain()
    handle.remove()
    assert model.config._attn_implementation == "eager"
