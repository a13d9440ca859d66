"""Cross-attention, which methods over grids leave alone: another method gets it, masks included."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import attn_plugins
from attn_plugins import registry
from attn_plugins.method import AttentionCall, Method, MethodConfig, Processor, SiteKind
from tests.support.snapshot import snapshot
from tests.support.tiny_models import MODELS, forward

pytestmark = pytest.mark.usefixtures("quiet_diffusers")
FAMILIES = ["sana", "pixart", "hunyuan_dit", "lumina_next", "sd15", "sdxl", "amused", "bria_fibo2", "kandinsky3"]


@dataclass(frozen=True)
class ScaledConfig(MethodConfig):
    """`by` times what cross-attention gives."""

    by: float = 1.0


class ScaledProcessor(Processor):
    def __init__(self, config: ScaledConfig) -> None:
        self.config = config

    def refuses(self, call: AttentionCall) -> str | None:
        return None

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        assert call.kind == "cross"
        attention = torch.nn.functional.scaled_dot_product_attention
        out = attention(call.q, call.k, call.v, call.mask, scale=call.scale)
        return out if self.config.by == 1.0 else self.config.by * out


@functools.cache
def _processor(config: ScaledConfig) -> ScaledProcessor:
    return ScaledProcessor(config)


class Scaled(Method):
    name = "scaled"
    title = "cross-attention, scaled"
    kind = "operator"
    paper = "none"
    config_class = ScaledConfig
    sites = frozenset({"cross"})

    def processor(self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind) -> Processor:
        assert isinstance(config, ScaledConfig)
        return _processor(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_cross_attention_is_patched_run_and_taken_back(family: str) -> None:
    tiny = MODELS[family]
    model, inputs = tiny.build(), tiny.inputs(2, 0)
    attn_plugins.patch(tiny.build(), Scaled())  # what is generated or loaded once stays
    dense, before = forward(model, inputs), snapshot(model)
    with attn_plugins.patched(model, Scaled()):
        assert torch.equal(forward(model, inputs), dense)
    with attn_plugins.patched(model, Scaled(), by=0.5):
        assert not torch.allclose(forward(model, inputs), dense, atol=1e-4)
    assert snapshot(model) == before
    assert torch.equal(forward(model, inputs), dense)


def test_a_mask_of_cross_attention_reaches_the_method() -> None:
    """Families that read padding as valid lengths of the picture's sequence read nothing for cross-attention."""
    tiny = MODELS["lumina_next"]
    model, inputs = tiny.build(), tiny.inputs(2, 0)
    handle = attn_plugins.patch(model, Scaled())
    masks: list[Any] = []
    processor = handle.patches[0].layers[0].processor

    class Seeing(ScaledProcessor):
        def __call__(self, call: AttentionCall) -> torch.Tensor:
            masks.append(call.mask)
            return super().__call__(call)

    for layer in handle.patches[0].layers:
        layer.processor = Seeing(processor.config)
    forward(model, inputs)
    assert masks and all(mask is not None and not mask.all() for mask in masks)


def test_sana_has_nothing_for_a_method_over_grids() -> None:
    with pytest.raises(ValueError, match="this Sana has cross: zero sites"):
        attn_plugins.patch(MODELS["sana"].build(), "gna", window=2)


def test_a_row_whose_class_is_not_there_is_only_a_row() -> None:
    """An older diffusers lacks classes: their rows name them, and import nothing."""
    names = {name for family in registry.families() if family.library == "diffusers" for name in family.classes}
    assert len(names) > 50 and all(isinstance(name, str) for name in names)
