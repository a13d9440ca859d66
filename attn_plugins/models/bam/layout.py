"""Where every tensor of a mixture comes from: which tensors of the dense models, and where an expert's part lies in it.

The orders of heads are those of `attention.py`. Nothing here reads or writes a file.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins.models.bam.architectures import Architecture, heads_of


@dataclass(frozen=True)
class Source:
    """Of one tensor of a mixture.

    Attributes:
        kind: "mean" of the experts', "experts": each has a part of its own, "router": made anew.
        names: of the dense tensors; several are joined along their rows.
        view, axis: for "experts": the tensor seen in this shape has the experts along this axis.
        fused: of a dense projection of q, k and v in a row for each head: (head size, which of the three).
    """

    kind: str
    names: tuple[str, ...] = ()
    view: tuple[int, ...] = ()
    axis: int = 0
    fused: tuple[int, int] | None = None

    def picked(self, dense: torch.Tensor) -> torch.Tensor:
        """What of a dense tensor is meant: all, or one of q, k, v."""
        if self.fused is None:
            return dense
        head_dim, which = self.fused
        return dense.unflatten(0, (-1, 3, head_dim))[:, which].flatten(0, 1)

    def place(self, out: torch.Tensor, expert: int, parts: list[torch.Tensor]) -> None:
        """Write an expert's dense tensors, one for each name, into the mixture's. A norm of all heads is repeated."""
        room = out.view(self.view).select(self.axis, expert)
        start = 0
        for part in map(self.picked, parts):
            if len(parts) == 1:
                room.copy_(part.reshape(room.shape) if part.numel() == room.numel() else part.expand(room.shape))
            else:
                room.narrow(0, start, len(part)).copy_(part)
                start += len(part)


def source_of(name: str, shape: tuple[int, ...], row: Architecture, config: Any) -> Source:
    """The source of a mixture's tensor, by its name and shape in the mixture's state dict."""
    found = re.fullmatch(rf"(.*layers\.\d+\.)(?:{row.attention}|mlp)\.(.+)", name)
    if found is None:
        return Source("mean", (name,))
    layer, inner = found.groups()
    if inner.endswith("router.weight"):
        return Source("router")
    if name.startswith(f"{layer}mlp."):
        return _of_feed_forward(f"{layer}mlp.", inner, shape, row)
    if config.attention_experts == "mean":
        return Source("mean", (name,))
    return _of_attention(f"{layer}{row.attention}.", inner, shape, row, config)


def _of_feed_forward(prefix: str, inner: str, shape: tuple[int, ...], row: Architecture) -> Source:
    """inner: experts.gate_up_proj, experts.down_proj_bias, ..."""
    kind = "bias" if inner.endswith("_bias") else "weight"
    names = (row.down,) if "down_proj" in inner else row.up
    return Source("experts", tuple(f"{prefix}{name}.{kind}" for name in names), view=shape)


def _of_attention(prefix: str, inner: str, shape: tuple[int, ...], row: Architecture, config: Any) -> Source:
    """inner: q_proj.weight, q_norm.weight, mix.o_proj.weight, mix.bias, ..."""
    experts = config.num_experts
    heads, kv_heads, head_dim = heads_of(config)
    shared, group = config.attention_experts == "shared_kv", heads // kv_heads
    if inner == "mix.o_proj.weight":
        width = math.prod(shape) // shape[0] // experts
        split = (kv_heads, experts, width // kv_heads) if shared else (experts, width)
        return Source("experts", (f"{prefix}{row.o}.weight",), view=(shape[0], *split), axis=2 if shared else 1)
    if inner == "mix.bias":
        return Source("experts", (f"{prefix}{row.o}.bias",), view=shape)
    module, kind = inner.rsplit(".", 1)
    dense, fused = f"{prefix}{inner}", None
    if shared and row.fused:
        dense, fused = f"{prefix}{row.fused}.{kind}", (head_dim, ("q_proj", "k_proj", "v_proj").index(module))
    if not shared:
        # Whole heads follow each other, expert by expert; a norm's weight (heads, [1,] D) does so too.
        return Source("experts", (dense,), view=(experts, shape[0] // experts, *shape[1:]))
    if module not in (row.q, row.q_norm):
        return Source("mean", (dense,), fused=fused)
    of_head = group * head_dim if module == row.q else group
    return Source("experts", (dense,), view=(kv_heads, experts, of_head, *shape[1:]), axis=1, fused=fused)
