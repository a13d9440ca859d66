"""The swap of processors: what it hands over, what it hands back, what it survives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins.method import AttentionCall, MethodConfig, Processor, SiteKind
from attn_plugins.patches import interception
from attn_plugins.runtime import Refused
from tests.support.snapshot import snapshot
from tests.support.tiny_models import MODELS, forward, sd15, wan
from tests.support.windowed import Recording, Windowed

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def recorded(model: Any, **more: Any) -> list[Recording]:
    handle = attn_plugins.patch(model, Windowed(), min_tokens=0, dense_steps=0, **more)
    layers = handle.patches[0].layers
    for layer in layers:
        layer.processor = Recording(layer.processor)
    return [layer.processor for layer in layers]  # type: ignore[misc]


@pytest.mark.parametrize("family", ["wan", "sd15"])
def test_outputs_keep_the_layout_that_the_processor_expects(family: str) -> None:
    tiny = MODELS[family]
    model = tiny.build()
    recordings = recorded(model)
    forward(model, tiny.inputs(1, 0))
    for recording in recordings:
        call, out = recording.calls[0]
        assert out.shape == call.q.shape
        assert out.stride() == call.q.stride()


def test_the_processor_keeps_its_signature_and_its_base_class() -> None:
    import inspect

    model = sd15()
    attention = next(m for n, m in model.named_modules() if n.endswith("attn1"))
    original = type(attention.processor)
    attn_plugins.patch(model, Windowed())
    assert isinstance(attention.processor, original) and type(attention.processor) is not original
    assert inspect.signature(attention.processor.__call__) == inspect.signature(original().__call__)
    assert type(type(attention.processor)()) is type(attention.processor)  # what IP-Adapter loaders do


def test_one_class_per_original_class() -> None:
    cls = type(wan().blocks[0].attn1.processor)
    assert interception.intercepted(cls) is interception.intercepted(cls)
    assert interception.intercepted(interception.intercepted(cls)) is interception.intercepted(cls)


def test_a_processor_that_calls_neither_is_refused_by_name() -> None:
    model = sd15()
    model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"AttnProcessor cannot be patched: .*dispatch_attention_fn.*Set one of"):
        attn_plugins.patch(model, Windowed())
    assert snapshot(model) == before


def test_a_shared_processor_is_swapped_once_and_restored() -> None:
    tiny = MODELS["sd15"]
    model = tiny.build()
    shared = diffusers.models.attention_processor.AttnProcessor2_0()
    model.set_attn_processor(shared)
    dense = forward(model, tiny.inputs(1, 0))
    before = snapshot(model)
    attn_plugins.patch(model, Windowed(), min_tokens=0)
    assert not torch.equal(forward(model, tiny.inputs(1, 0)), dense)
    attn_plugins.unpatch(model)
    assert snapshot(model) == before


def test_replaced_processors_are_patched_again() -> None:
    tiny = MODELS["sd15"]
    model, inputs = tiny.build(), tiny.inputs(1, 0)
    dense = forward(model, inputs)
    attn_plugins.patch(model, Windowed(), min_tokens=0)
    sparse = forward(model, inputs)
    model.fuse_qkv_projections()  # replaces the processors
    torch.testing.assert_close(forward(model, inputs), sparse)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(forward(model, inputs), sparse)
    attn_plugins.unpatch(model)
    for name, module in model.named_modules():
        if name.endswith(("attn1", "attn2")):
            assert type(module.processor) is diffusers.models.attention_processor.AttnProcessor2_0
    torch.testing.assert_close(forward(model, inputs), dense)


def test_a_replacement_that_cannot_be_patched_is_dense_with_a_warning() -> None:
    tiny = MODELS["sd15"]
    model, inputs = tiny.build(), tiny.inputs(1, 0)
    dense = forward(model, inputs)
    attn_plugins.patch(model, Windowed(), min_tokens=0)
    model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    with pytest.warns(UserWarning, match="replaced by AttnProcessor"):
        torch.testing.assert_close(forward(model, inputs), dense)


def test_dense_calls_go_to_the_users_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    tiny = MODELS["wan"]
    model, inputs = tiny.build(), tiny.inputs(1, 0)
    model.set_attention_backend("_native_math")
    attn_plugins.patch(model, Windowed(), dense_steps=1, layers=0)
    seen = []
    original = attention_dispatch.dispatch_attention_fn

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs["backend"])
        return original(*args, **kwargs)

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", spy)
    try:
        forward(model, inputs)
    finally:
        attention_dispatch._AttentionBackendRegistry.set_active_backend(attention_dispatch.AttentionBackendName.NATIVE)
    assert [str(getattr(backend, "value", backend)) for backend in seen] == ["_native_math"]


def test_ring_attention_stays_dense() -> None:
    """Ulysses does not: tests/distributed/test_ulysses.py."""
    model = wan()
    attn_plugins.patch(model, Windowed())
    ring = SimpleNamespace(ring_degree=2, ulysses_degree=1, _ulysses_local_rank=0)
    interception._running.layer = model.blocks[0].attn1.__dict__["_attn_plugins"]
    try:
        q = torch.randn(1, 36, 2, 12)
        parallel = SimpleNamespace(context_parallel_config=ring)
        with pytest.warns(UserWarning, match="ring attention"), pytest.raises(Exception):  # noqa: B017
            interception._dispatch(q, q, q, parallel_config=parallel)
    finally:
        interception._running.layer = None


class DropoutAndMask(Windowed):
    """Remembers what it is asked."""

    name = "asked"

    def processor(self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind) -> Processor:
        return _ASKED


class _Asked(Processor):
    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    wants_inputs = True

    def refuses(self, call: AttentionCall) -> str | None:
        self.calls.append(call)
        return super().refuses(call)

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        return call.q


_ASKED = _Asked()


def test_flags_and_inputs_are_forwarded_and_masks_refused() -> None:
    tiny = MODELS["wan"]
    model = tiny.build()
    attn_plugins.patch(model, DropoutAndMask())
    forward(model, tiny.inputs(1, 0))
    hidden_states = _ASKED.calls[-1].extras["args"][0]
    assert hidden_states.shape == (1, 36, 24)
    interception._running.layer = model.blocks[0].attn1.__dict__["_attn_plugins"]
    interception._running.inputs = ((), {})
    try:
        q = torch.randn(1, 2, 36, 12)
        interception._sdpa(q, q, q, is_causal=True, scale=0.25)
        assert (_ASKED.calls[-1].causal, _ASKED.calls[-1].scale) == (True, 0.25)
        mask = torch.ones(1, 1, 36, 36, dtype=torch.bool).tril()
        with pytest.warns(UserWarning, match="attention mask"):
            out = interception._sdpa(q, q, q, mask)
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q, mask))
        with pytest.warns(UserWarning, match="dropout"):
            interception._sdpa(q, q, q, dropout_p=0.5)
    finally:
        interception._running.layer = interception._running.inputs = None


def test_strict_raises_instead() -> None:
    tiny = MODELS["ltx_video"]
    model, inputs = tiny.build(), tiny.inputs(1, 0)
    inputs = {**inputs, "num_frames": None, "height": None, "width": None, "video_coords": torch.zeros(1, 3, 36)}
    attn_plugins.patch(model, Windowed(), strict=True)
    with pytest.raises(Refused, match="no raster of frames, rows and columns"):
        forward(model, inputs)


def test_lora_and_layer_skip_still_work() -> None:
    peft = pytest.importorskip("peft")
    tiny = MODELS["flux"]
    model, inputs = tiny.build(), tiny.inputs(1, 0)
    dense = forward(model, inputs)
    attn_plugins.patch(model, Windowed(), dense_steps=0)
    sparse = forward(model, inputs)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    torch.testing.assert_close(forward(model, inputs), sparse)  # LoRA begins at zero
    model.delete_adapters("default")
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    patched_class = type(model.transformer_blocks[0].attn.processor)
    assert AttentionProcessorRegistry.get(patched_class) is AttentionProcessorRegistry.get(patched_class.__mro__[1])
    attn_plugins.unpatch(model)
    assert torch.equal(forward(model, inputs), dense)
