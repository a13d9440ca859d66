"""The classes of mixtures, made from an architecture's own: its attention, layer, body and head."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from attn_plugins.models.bam.architectures import Architecture
from attn_plugins.models.bam.attention import BamAttention
from attn_plugins.models.bam.config import HOME, config_class
from attn_plugins.models.bam.feed_forward import BamFeedForward
from attn_plugins.models.bam.heads import BamForCausalLM, BamForImageClassification
from attn_plugins.models.bam.neox import SharedNeoXAttention
from attn_plugins.models.bam.routing import RoutingCall, running
from attn_plugins.models.bam.vit import SharedViTAttention
from attn_plugins.models.bam.weights import BamWeights


class BamLayer(nn.Module):
    """Before an architecture's layer: what is in it reads the call that it runs in."""

    def forward(self, *args: Any, routing: RoutingCall | None = None, **kwargs: Any) -> Any:
        if routing is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with running(routing):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class BamBody(BamWeights):
    """Before an architecture's model without a head."""

    architecture: Architecture

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        row = self.architecture
        attention, layer_class = part_class(row, "Attention"), part_class(row, row.layer)
        for index, layer in enumerate(self.layers):  # type: ignore[arg-type]
            if config.attention_experts != "mean":
                setattr(layer, row.attention, attention(config, index))
            layer.mlp = BamFeedForward(config, row, layer.mlp)
            layer.__class__ = layer_class  # its forward is kept, and with it the order of the block
        self.post_init()  # type: ignore[operator]


# An architecture whose attention cannot do with shared keys as it is.
_ATTENTION: dict[str, Any] = {"gpt_neox": SharedNeoXAttention, "vit": SharedViTAttention}
_HEADS: dict[str, Any] = {"ForCausalLM": BamForCausalLM, "ForImageClassification": BamForImageClassification}


@functools.cache
def part_class(row: Architecture, part: str) -> Any:
    """A class of mixtures of this architecture: Attention, its layer, Model, its head; the same one every time."""
    kinds: dict[str, Any] = {
        "Attention": _ATTENTION.get(row.name, BamAttention),
        row.layer: BamLayer,
        "Model": BamBody,
        **_HEADS,
    }
    ours, dense = kinds[part], row.dense_class(part)
    body: dict[str, Any] = {"__module__": HOME, "__doc__": ours.__doc__, "architecture": row}
    if part in ("Model", row.head):
        body |= {"config_class": config_class(row), "_no_split_modules": [row.class_name(row.layer)]}
        # So that saving writes the file that loads it anywhere (`config.HOME`).
        body |= {"_auto_class": "AutoModel" if part == "Model" else row.auto}
    if part == row.head:
        body |= {"body_class": part_class(row, "Model"), "forward": _signed(ours.forward, dense.forward)}
    return type(row.class_name(part), (ours, dense), body)


def _signed(ours: Any, dense: Any) -> Any:
    """Our forward under the dense one's signature: Trainer and `generate` read from it what a model takes."""

    @functools.wraps(dense)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    return forward
