"""Query and output projections that compute what a router leaves of their heads, and nothing else.

In place: a linear layer becomes one of a subclass, with the same weights, and is itself again after `unpatch`. Only
where nothing is trained; where a graph is compiled, where few tokens come, or where most heads are active, the whole
product is the faster one, and equal. Keys and values are read by every token, and stay whole.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from attn_plugins.method import SiteShape
from attn_plugins.patches.family import Undo
from attn_plugins.patches.shapes import of_attention, output_name, query_name
from attn_plugins.runtime import Layer

ROUTED = "_attn_plugins_routed"  # where its layer hangs on a projection
# Measured on a CPU: below these, gathering rows costs what not multiplying them saves.
CHUNK = 2048  # tokens whose rows are gathered together
LEAST_TOKENS = 512
LEAST_WIDTH = {2: 2048}  # of a model, by bytes an element: 16-bit products are fast, and their rows as dear to gather
MOST_ACTIVE = 0.7  # of the heads


class _Hold(NamedTuple):
    layer: Layer
    head_dim: int


class _Share(NamedTuple):
    """Some tokens of a chunk, (n,) from its first on, and the channels of the heads that they all have."""

    chunk: slice
    rows: torch.Tensor
    channels: slice


class RoutedQuery(nn.Linear):
    """Queries of heads that are not computed are 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = _shares(self, x, self.out_features)
        if shares is None:
            return F.linear(x, self.weight, self.bias)
        self.__dict__[ROUTED].layer.root.moment.lean = True
        tokens = x.flatten(0, -2)
        out = tokens.new_zeros(len(tokens), self.out_features)
        for chunk, rows, channels in shares:
            bias = None if self.bias is None else self.bias[channels]
            some = F.linear(tokens[chunk].index_select(0, rows), self.weight[channels], bias)
            out[chunk, channels].index_copy_(0, rows, some)
        return out.view(*x.shape[:-1], -1)


class RoutedOutput(nn.Linear):
    """Heads that were not computed are 0, and are left out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = _shares(self, x, self.in_features, served=True)
        if shares is None:
            return F.linear(x, self.weight, self.bias)
        tokens = x.flatten(0, -2)
        out = tokens.new_zeros(len(tokens), self.out_features)
        for chunk, rows, channels in shares:
            some = F.linear(tokens[chunk, channels].index_select(0, rows), self.weight[:, channels])
            out[chunk].index_add_(0, rows, some)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], -1)


def _shares(linear: nn.Linear, x: torch.Tensor, channels: int, served: bool = False) -> Iterator[_Share] | None:
    """What is to be computed; None: everything. `served`: only once the method has run."""
    held = linear.__dict__.get(ROUTED)
    if held is None:  # unpatched, but someone (accelerate's hooks) kept this forward
        return None
    layer, head_dim = held
    routing = layer.prepared
    if (
        torch.compiler.is_compiling()
        or x.is_meta
        or (served and not layer.root.moment.served)
        or getattr(routing, "gates", None) is None
        or torch.is_autocast_enabled(x.device.type)
    ):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or linear.weight.requires_grad):
        return None
    gates, group, tokens = routing.gates, routing.group, x.shape[:-1].numel()
    whole = gates.shape[-1] * head_dim == channels and gates.shape[:-1].numel() == tokens
    narrow = min(linear.weight.shape) < LEAST_WIDTH.get(linear.weight.element_size(), 0)
    if not whole or narrow or tokens < LEAST_TOKENS:
        return None
    active = gates.flatten(0, -2)[:, ::group] != 0  # (tokens, units)
    if float(active.float().mean()) > MOST_ACTIVE:
        return None
    return _each(active, group * head_dim)


def _each(active: torch.Tensor, width: int) -> Iterator[_Share]:
    for first in range(0, len(active), CHUNK):
        chunk = slice(first, first + CHUNK)
        units, rows = active[chunk].t().nonzero(as_tuple=True)
        counts = torch.bincount(units, minlength=active.shape[1]).tolist()
        for unit, some in enumerate(rows.split(counts)):
            if len(some):
                yield _Share(chunk, some, slice(unit * width, (unit + 1) * width))


def route(root: nn.Module, module: nn.Module, layer: Layer) -> list[Undo]:
    """Let an attention module's projections skip, if its method asks for it; returns what takes that back."""
    shape = of_attention(root, module) if layer.processor.skips_projections else None
    if not isinstance(shape, SiteShape):
        return []
    undo: list[Undo] = []
    for name, cls in ((query_name(module), RoutedQuery), (output_name(module), RoutedOutput)):
        linear = None if name is None else module.get_submodule(name)
        if type(linear) is not nn.Linear or type(linear.weight.data) is not torch.Tensor:
            of = f"{type(module).__module__}.{type(module).__name__}"
            which = (
                f"no {cls.__name__[6:].lower()} projection of its own"
                if linear is None
                else f"{name} is a {type(linear)}"
            )
            note = f"attn_plugins: skip_projections=True: {of}: {which}, and computes all heads"
            if note not in layer.root.warned:
                layer.root.warned.add(note)
                warnings.warn(note, stacklevel=2)
            continue
        linear.__class__ = cls
        linear.__dict__[ROUTED] = _Hold(layer, shape.head_dim)
        undo.append(functools.partial(_restore, linear))
    return undo


def _restore(linear: nn.Module) -> None:
    if linear.__dict__.pop(ROUTED, None) is not None:
        linear.__class__ = nn.Linear
