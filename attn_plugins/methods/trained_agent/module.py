"""`AgentAttention`: a whole attention layer with trained agents, in the forms of the authors' four backbones.

| form | projections | tokens |
|---|---|---|
| DeiT, Swin | qkv, proj | all, or one window each as a batch item |
| PVT | q, kv, proj; sr and norm before kv where keys are reduced | all |
| CSWin | none: it is given q, k, v, and stripes are cut here | stripes |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from attn_plugins.methods.trained_agent.weights import CONVOLUTIONS, AgentWeights, agents_per_axis


class AgentAttention(AgentWeights):
    """Agent Attention (arXiv 2312.08874, section 3) as a layer to build models of, or to load the authors' layers into.

    Args:
        width: channels; a multiple of `heads`.
        heads: of attention.
        grid: tokens per axis at the size it is made for; forward takes any.
        agents: how many (a square number on a square grid), or how many per axis.
        own_tokens: class and distillation tokens before the grid.
        reduction: keys and values are made from `reduction` tokens an axis at once (PVT's sr_ratio).
        window: tokens per axis of the windows that attend each by itself; None: the whole grid. The weights are then
            those of a window.
        projections: "qkv", "q_kv" or "none".
        qkv_bias: of the projections.
        std: of the biases' first values, as the authors draw them; 0 leaves them and the convolution zero, for a layer
            that is to begin as a dense one's weights left it.
        block, kernel, bias: as in `AgentWeights`.

    Raises:
        ValueError: sizes that make no layer.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        grid: tuple[int, ...],
        agents: int | tuple[int, ...] = 49,
        own_tokens: int = 0,
        reduction: int = 1,
        window: tuple[int, ...] | None = None,
        projections: str = "qkv",
        qkv_bias: bool = True,
        std: float = 0.02,
        block: int = 7,
        kernel: int = 3,
        bias: bool = True,
    ) -> None:
        if width % heads:
            raise ValueError(f"width={width}: give a multiple of heads={heads}")
        if projections not in ("qkv", "q_kv", "none"):
            raise ValueError(f"projections={projections!r}: legal are 'qkv', 'q_kv', 'none'")
        if reduction < 1 or (reduction > 1 and (projections != "q_kv" or window or own_tokens)):
            raise ValueError(
                f"reduction={reduction}: 1 or more; above 1 with projections='q_kv', no windows and no own tokens"
            )
        if window and own_tokens:
            raise ValueError(f"own_tokens={own_tokens} stand in no window: give window=None")
        super().__init__(
            heads, width // heads, grid=window or grid, agents=agents_per_axis(agents, window or grid),
            own_tokens=own_tokens, block=block, kernel=kernel, bias=bias,
            key_grid=tuple(size // reduction for size in grid) if reduction > 1 else None,
        )  # fmt: skip
        self.width, self.image, self.window, self.reduction = width, grid, window, reduction
        self.projections = projections
        if projections == "qkv":
            self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        elif projections == "q_kv":
            self.q = nn.Linear(width, width, bias=qkv_bias)
            self.kv = nn.Linear(width, 2 * width, bias=qkv_bias)
        if projections != "none":
            self.proj = nn.Linear(width, width)
        if reduction > 1:
            self.sr = CONVOLUTIONS[len(grid) - 1](width, width, reduction, stride=reduction)
            self.norm = nn.LayerNorm(width)
        if std:
            for name, parameter in self.named_parameters(recurse=False):
                if name.endswith("_bias"):
                    nn.init.trunc_normal_(parameter, std=std)
            if self.dwc is not None:
                self.dwc.reset_parameters()

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        grid: tuple[int, ...] | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """The layer's output, (B, N, width).

        Args:
            x: (B, N, width), N = own + prod(grid); of a layer without projections q, k and v of that shape (a tuple, or
                one tensor (3, B, N, width)).
            grid: tokens per axis; None: those that the layer was made for.
            options: as in `AgentWeights.forward`: scale, power, shortcut, backend.

        Raises:
            ValueError: tokens that are not the grid's, or a grid that windows do not divide.
        """
        grid = tuple(grid) if grid else self.image
        q, k, v, key_grid = self._projected(x, grid)
        if q.shape[1] != self.own_tokens + math.prod(grid):
            own = f"{self.own_tokens} own tokens and " if self.own_tokens else ""
            raise ValueError(
                f"x has {q.shape[1]} tokens, and {own}grid={grid} make {self.own_tokens + math.prod(grid)}"
            )
        cells = grid
        if self.window is not None:
            cells = self.window
            q, k, v = (_cut(t, grid, cells) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        found = super().forward(q, k, v, cells, key_grid=key_grid, **options)
        out = found.transpose(1, 2).flatten(2)
        if self.window is not None:
            out = _joined(out, grid, cells)
        return out if self.projections == "none" else self.proj(out)

    def _projected(
        self, x: Any, grid: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...] | None]:
        if self.projections == "none":
            q, k, v = x
            return q, k, v, None
        if self.projections == "qkv":
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return q, k, v, None
        source, key_grid = x, None
        if self.reduction > 1:
            image = self.sr(x.transpose(1, 2).unflatten(2, grid))
            source, key_grid = self.norm(image.flatten(2).transpose(1, 2)), tuple(image.shape[2:])
        k, v = self.kv(source).chunk(2, dim=-1)
        return self.q(x), k, v, key_grid

    @classmethod
    def from_authors(
        cls,
        state_dict: Mapping[str, torch.Tensor],
        *,
        grid: tuple[int, ...] | None = None,
        window: tuple[int, ...] | None = None,
        agents: int | tuple[int, ...] | None = None,
        prefix: str = "",
    ) -> AgentAttention:
        """The layer of an attention module of the authors' Agent-DeiT, Agent-PVT, Agent-Swin or Agent-CSWin.

        Its form, heads, channels and tokens are read from the state dict; a larger one is looked into at `prefix`
        ("blocks.0.attn."). Swin's has no word of the picture: the layer takes windows as batch items, as theirs does,
        unless `grid` and `window` cut them here. CSWin's needs `grid`, the picture's tokens: stripes are cut here.

        Args:
            grid: tokens per axis, where they are to be others than the checkpoint's: biases are resized.
            window: of a layer whose windows are cut here; None with CSWin: the checkpoint's stripes.
            agents: another number of them.

        Raises:
            ValueError: no such module at `prefix`.
        """
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if "an_bias" not in own:
            raise ValueError(f"prefix={prefix!r}: no agent attention there; its keys would be {prefix}an_bias, ...")
        heads, count = own["an_bias"].shape[:2]
        here = (own["ha_bias"].shape[2], own["wa_bias"].shape[3])
        form = "qkv" if "qkv.weight" in own else "q_kv" if "q.weight" in own else "none"
        if form == "none":
            own = {key.replace("get_v.", "dwc."): value for key, value in own.items()}
            if grid is None:
                raise ValueError(f"the stripes of this CSWin layer are {here}: give the picture's tokens, grid=(H, W)")
            window = window or here
        made = cls(
            own["dwc.weight"].shape[0], heads, grid=grid or here, window=window, agents=agents or count,
            own_tokens=own["ac_bias"].shape[-1] if "ac_bias" in own else 0,
            reduction=own["sr.weight"].shape[-1] if "sr.weight" in own else 1, projections=form,
            qkv_bias="qkv.bias" in own or "q.bias" in own, std=0, block=own["an_bias"].shape[-1],
            kernel=own["dwc.weight"].shape[-1],
        )  # fmt: skip
        made.load_state_dict(own)
        return made


def _cut(t: torch.Tensor, grid: tuple[int, ...], window: tuple[int, ...]) -> torch.Tensor:
    """(B, prod(grid), C) as (B * windows, prod(window), C)."""
    if len(window) != len(grid) or any(size % side for size, side in zip(grid, window, strict=True)):
        raise ValueError(f"window={window} does not divide grid={grid}: pad the picture to a multiple")
    sizes = [part for size, side in zip(grid, window, strict=True) for part in (size // side, side)]
    axes, last = len(grid), 2 * len(grid) + 1
    image = t.unflatten(1, sizes)
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), last]
    return image.permute(order).flatten(1 + axes, 2 * axes).flatten(0, axes)


def _joined(t: torch.Tensor, grid: tuple[int, ...], window: tuple[int, ...]) -> torch.Tensor:
    """Back again."""
    counts = [size // side for size, side in zip(grid, window, strict=True)]
    axes = len(grid)
    parts = t.unflatten(1, window).unflatten(0, (-1, *counts))
    order = [0, *[place for axis in range(axes) for place in (1 + axis, 1 + axes + axis)], 1 + 2 * axes]
    return parts.permute(order).flatten(1, 2 * axes)
