"""Soft attention experts in a dense model that is loaded: its attention modules and those of other models, mixed.

    graft = graft_experts(model, [code_model, prose_model])
    ...
    graft.remove()                     # the model's own attention modules again, untouched

The feed-forwards, norms and embeddings stay the model's: what `attn-plugins upcycle` does with those needs a model of
another type. Routers are new; until they are trained the attentions are mixed about evenly.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from attn_plugins.models.bam.architectures import Architecture, of
from attn_plugins.models.bam.layout import source_of


class Graft:
    """What was put in. `experts`: how many there are, the model's own included."""

    def __init__(self, layers: list[tuple[nn.Module, str, nn.Module]], experts: int) -> None:
        self.layers, self.experts = layers, experts

    def parameters(self) -> list[nn.Parameter]:
        """Of the new modules: experts' copies and routers."""
        return [weight for layer, name, _ in self.layers for weight in getattr(layer, name).parameters()]

    def remove(self) -> None:
        """Put the former modules back; nothing if that is done. What was done to the model meanwhile (`half`, `cuda`,
        `eval`) is done to them now: nobody saw them while they stood aside.
        """
        for layer, name, before in self.layers:
            held = getattr(layer, name)
            then, now = next(before.parameters()), next(held.parameters())
            if (then.device, then.dtype) != (now.device, now.dtype):  # a new module begins with those of the former
                before.to(now.device, now.dtype)
            if before.training != held.training:
                before.train(held.training)
            setattr(layer, name, before)
        self.layers.clear()


def graft_experts(model: Any, experts: Sequence[Any], *, attention: str = "all_params", seed: int = 0) -> Graft:
    """Put the attentions of `experts` beside the model's own, mixed by `softmax(W x)` (arXiv 2408.08274, section 3.1).

    Args:
        model: a dense model of an architecture that BAM mixes.
        experts: models of the same architecture and sizes, on any device; their weights are copied.
        attention: "all_params", or "shared_kv" for queries and outputs of each, keys and values the mean of all.
        seed: of the routers; the global random state is not drawn from.

    Raises:
        ValueError: no expert, a model of another architecture or size, one whose attention is not as it was made (an
            adapter's, a mixture's).
    """
    row = of(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if attention not in ("all_params", "shared_kv"):
        raise ValueError(f"attention={attention!r}: legal are 'all_params', 'shared_kv'")
    if not experts:
        raise ValueError("experts is empty: give one model or more besides the model itself")
    all_layers = [_layers(one, row) for one in (model, *experts)]
    _check(all_layers, row, model, experts)
    config = copy.copy(model.config)
    config.num_experts, config.attention_experts = len(all_layers), attention
    done: list[tuple[nn.Module, str, nn.Module]] = []
    for index, same in enumerate(zip(*all_layers, strict=True)):
        before = [getattr(layer, row.attention) for layer in same]
        new = _mixed(row, config, index, before, seed)
        new.config = model.config  # the model's choice of an attention implementation is read from there
        done.append((same[0], row.attention, before[0]))
        setattr(same[0], row.attention, new.train(before[0].training))
    return Graft(done, len(all_layers))


def _layers(model: Any, row: Architecture) -> list[nn.Module]:
    body = getattr(model, row.body, model)  # or the model without its head
    if not isinstance(getattr(body, "layers", None), nn.ModuleList):
        raise ValueError(f"{type(model).__name__} is no {row.prefix} model: all experts are of one architecture")
    return list(body.layers)


def _check(all_layers: list[list[nn.Module]], row: Architecture, model: Any, experts: Sequence[Any]) -> None:
    plain = row.dense_class("Attention")
    for one, layers in zip((model, *experts), all_layers, strict=True):
        if len(layers) != len(all_layers[0]):
            raise ValueError(f"an expert of {len(layers)} layers, for a model of {len(all_layers[0])}")
        for layer, own in zip(layers, all_layers[0], strict=True):
            attention: Any = getattr(layer, row.attention, None)
            wanted = getattr(own, row.attention).state_dict()
            if type(attention) is not plain:
                raise ValueError(
                    f"the attention of {type(one).__name__} is a {type(attention).__name__}: {plain.__name__} is "
                    "wanted, as transformers makes it"
                )
            shapes = {name: tuple(tensor.shape) for name, tensor in attention.state_dict().items()}
            unlike = [name for name, tensor in wanted.items() if shapes.pop(name, None) != tuple(tensor.shape)]
            if unlike or shapes:
                raise ValueError(f"{(unlike or list(shapes))[0]} of an expert has another shape than the model's")


@torch.no_grad()
def _mixed(row: Architecture, config: Any, index: int, before: list[Any], seed: int) -> Any:
    """The attention of one layer, on the device and in the precision of the first."""
    from attn_plugins.models.bam.model import part_class

    first = next(before[0].parameters())
    with torch.device("meta"):
        new = part_class(row, "Attention")(config, index)
    new = new.to(first.dtype).to_empty(device=first.device)
    states = [module.state_dict() for module in before]
    prefix = f"layers.{index}.{row.attention}."
    for name, out in new.state_dict().items():
        source = source_of(prefix + name, tuple(out.shape), row, config)
        parts = [[state[dense.removeprefix(prefix)] for dense in source.names] for state in states]
        if source.kind == "router":
            generator = torch.Generator().manual_seed(zlib.crc32(f"{prefix}{name}".encode()) ^ (seed << 32))
            out.copy_(torch.randn(out.shape, generator=generator) * config.initializer_range)
        elif source.kind == "mean":
            same = [source.picked(part).to(out.device).double() for (part,) in parts]
            out.copy_((torch.stack(same).sum(0) / len(same)).float())
        else:
            for number, part in enumerate(parts):
                source.place(out, number, [tensor.to(out.device) for tensor in part])
    return new
