"""The weights that trained agents add to an attention layer: biases of both steps, and a convolution of the values.

Names and shapes are those of the authors' checkpoints, so their state dicts load by key; at another resolution or with
another number of agents they are resized as they load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attn_plugins.ops.agent import agent_attention, agent_grid, depthwise, pool_tokens
from attn_plugins.ops.agent.biases import agents_resized, cell_bias, resized, with_own_tokens

AXES = "thw"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
POOLS = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


class AgentWeights(nn.Module):
    """Biases and convolution of one layer (arXiv 2312.08874, section 3.2 and 3.3), all zero at first.

    Of a grid of rows and columns the parameters are an_bias, na_bias (H, n, block, block), ah_bias (1, H, n, rows, 1),
    aw_bias (1, H, n, 1, columns), ha_bias (1, H, rows, 1, n), wa_bias (1, H, 1, columns, n), with own tokens ac_bias
    (1, H, n, own) and ca_bias (1, H, own, n), and dwc, a depthwise convolution. One axis more has at_bias and ta_bias,
    one less has no ah_bias and ha_bias.

    Args:
        heads, head_dim: of the layer.
        grid: tokens per axis, 1 to 3 axes, at the size that the layer is made for; forward takes any.
        agents: per axis.
        own_tokens: class, distillation and register tokens before the grid. They gather, are gathered from and read
            agents under biases of their own, and get no convolution.
        block: side of the coarse biases.
        kernel: side of the convolution, odd; 0 for none.
        bias: whether there are biases.
        key_grid: tokens of keys and values per axis, where they are fewer than the queries (PVT).

    Raises:
        ValueError: sizes that make no layer; the message says which.
    """

    an_bias: nn.Parameter
    na_bias: nn.Parameter
    ca_bias: nn.Parameter

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        grid: tuple[int, ...],
        agents: tuple[int, ...],
        own_tokens: int = 0,
        block: int = 7,
        kernel: int = 3,
        bias: bool = True,
        key_grid: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        _check(heads, head_dim, grid, agents, own_tokens, block, kernel, key_grid)
        self.heads, self.head_dim = heads, head_dim
        self.grid, self.agents, self.own_tokens = grid, agents, own_tokens
        self.key_grid = key_grid or grid
        self.has_bias = bias
        count, axes = math.prod(agents), len(grid)
        if bias:
            for name in ("an_bias", "na_bias"):
                self._add(name, heads, count, *[block] * axes)
            for axis, letter in enumerate(AXES[-axes:]):
                before, after = [1] * axis, [1] * (axes - axis - 1)
                self._add(f"a{letter}_bias", 1, heads, count, *before, self.key_grid[axis], *after)
                self._add(f"{letter}a_bias", 1, heads, *before, grid[axis], *after, count)
            if own_tokens:
                self._add("ac_bias", 1, heads, count, own_tokens)
                self._add("ca_bias", 1, heads, own_tokens, count)
        self.dwc: nn.Conv1d | nn.Conv2d | nn.Conv3d | None = None
        if kernel:
            width = heads * head_dim
            # skip_init: making a layer must not draw from the global random state
            self.dwc = nn.utils.skip_init(
                CONVOLUTIONS[axes - 1], width, width, kernel, padding=kernel // 2, groups=width
            )
            for parameter in self.dwc.parameters():
                nn.init.zeros_(parameter)

    def _add(self, name: str, *shape: int) -> None:
        self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        grid: tuple[int, ...] | None = None,
        *,
        key_grid: tuple[int, ...] | None = None,
        agents: torch.Tensor | None = None,
        scale: float | None = None,
        power: float = 0.5,
        shortcut: float = 0.0,
        backend: str = "auto",
    ) -> torch.Tensor:
        """Attention through the agents.

        Args:
            q, k, v: (B, H, own + prod(grid), D); of k and v prod(key_grid) where that is another grid.
            grid: tokens per axis in this call; None: those that the layer was made for.
            agents: (B, H, n, D); None: means of q over the layer's number of cells per axis.
            scale, power, shortcut, backend: as in `methods.agent`: power 0.5 scales the second step as the first.

        Returns:
            (B, H, own + prod(grid), D).
        """
        grid = grid or self.grid
        key_grid = key_grid or (grid if self.key_grid == self.grid else self.key_grid)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if agents is None:
            agents = self.pooled(q, grid)
        image = grid if self.dwc is not None and key_grid == grid else None
        weight, bias = self._convolution(v)
        out = agent_attention(
            q, k, v, agents, scale_aggregate=scale, scale_broadcast=scale * q.shape[-1] ** (0.5 - power),
            bias_aggregate=self.aggregate_bias(key_grid, q.dtype), bias_broadcast=self.broadcast_bias(grid, q.dtype),
            shortcut=shortcut, dwc_weight=weight if image else None, dwc_bias=bias if image else None, grid=image,
            backend=backend,
        )  # fmt: skip
        if weight is None or image is not None:
            return out
        texture = depthwise(self._enlarged(v, key_grid, grid), grid, weight, bias)
        return out + F.pad(texture, (0, 0, self.own_tokens, 0))

    def pooled(self, q: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """The agents of queries, (B, H, n, D); along an axis with fewer tokens than agents, agents are repeated."""
        if all(few <= many for few, many in zip(self.agents, grid, strict=True)):
            return pool_tokens(q, grid, self.agents, self.own_tokens)
        image = q[:, :, self.own_tokens :].flatten(0, 1).transpose(1, 2).unflatten(2, grid)
        found = POOLS[len(grid) - 1](image, self.agents if len(grid) > 1 else self.agents[0])  # type: ignore[arg-type]
        return found.flatten(2).transpose(1, 2).unflatten(0, q.shape[:2])

    def aggregate_bias(self, grid: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Of the first step, over a grid of keys: (1, H, n, own + prod(grid))."""
        if not self.has_bias:
            return None
        lines = [getattr(self, f"a{letter}_bias") for letter in AXES[-len(grid) :]]
        return with_own_tokens(cell_bias(self.an_bias, lines, grid), getattr(self, "ac_bias", None)).to(dtype)

    def broadcast_bias(self, grid: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Of the second step, over a grid of queries: (1, H, own + prod(grid), n)."""
        if not self.has_bias:
            return None
        lines = [getattr(self, f"{letter}a_bias").movedim(-1, 2) for letter in AXES[-len(grid) :]]
        own = self.ca_bias.transpose(2, 3) if self.own_tokens else None
        return with_own_tokens(cell_bias(self.na_bias, lines, grid), own).transpose(2, 3).to(dtype)

    def _convolution(self, v: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.dwc is None:
            return None, None
        assert self.dwc.bias is not None  # it was made with one
        return self.dwc.weight.to(v.dtype), self.dwc.bias.to(v.dtype)

    def _enlarged(self, v: torch.Tensor, key_grid: tuple[int, ...], grid: tuple[int, ...]) -> torch.Tensor:
        image = v[:, :, self.own_tokens :].transpose(2, 3).flatten(0, 1).unflatten(2, key_grid)
        return resized(image, grid).flatten(2).unflatten(0, v.shape[:2]).transpose(2, 3)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in list(self._names_there(state_dict, prefix)):
            state_dict[prefix + name] = self._fitted(name, state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _names_there(self, state_dict: dict[str, Any], prefix: str) -> Iterator[str]:
        return (name for name in self._parameters if name.endswith("_bias") and prefix + name in state_dict)

    def _fitted(self, name: str, saved: torch.Tensor) -> torch.Tensor:
        """A saved bias at this layer's resolution and number of agents; as it is where that cannot be."""
        want, axes = getattr(self, name).shape, len(self.grid)
        if saved.shape == want or saved.dim() != len(want):
            return saved
        block = name in ("an_bias", "na_bias")
        dim = 1 if block else -1 if name[1] == "a" else 2
        side = round(saved.shape[dim] ** (1 / axes))
        if saved.shape[dim] != want[dim]:
            if side**axes != saved.shape[dim]:
                return saved
            saved = agents_resized(saved, dim, (side,) * axes, self.agents)
        if block:
            return resized(saved, tuple(want[2:]))
        if "c" in name:
            return saved  # own tokens have no resolution
        line = saved if dim == 2 else saved.movedim(-1, 2)
        line = resized(line[0], tuple(want[3:] if dim == 2 else want[2:-1]))[None]
        return line if dim == 2 else line.movedim(2, -1)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, grid={self.grid}, agents={self.agents}, own_tokens={self.own_tokens}"


def agents_per_axis(agents: int | tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    """A square number of agents stands in a square, as the authors' do, whatever the grid's aspect."""
    if isinstance(agents, tuple):
        return agents
    side = round(agents ** (1 / len(grid)))
    return (side,) * len(grid) if side ** len(grid) == agents else agent_grid(grid, agents)


def _check(
    heads: int, head_dim: int, grid: tuple[int, ...], agents: tuple[int, ...], own_tokens: int, block: int, kernel: int,
    key_grid: tuple[int, ...] | None,
) -> None:  # fmt: skip
    if min(heads, head_dim, block) < 1 or own_tokens < 0:
        raise ValueError(f"heads={heads}, head_dim={head_dim}, block={block}, own_tokens={own_tokens}: give 1 or more")
    if not 1 <= len(grid) <= 3 or min(grid) < 1:
        raise ValueError(f"grid={grid}: legal are 1 to 3 axes of 1 or more tokens")
    for name, sizes in (("agents", agents), ("key_grid", key_grid or grid)):
        if len(sizes) != len(grid) or min(sizes) < 1:
            raise ValueError(f"{name}={sizes} of grid={grid}: give 1 or more per axis of the grid")
    if kernel < 0 or (kernel and kernel % 2 == 0):
        raise ValueError(f"kernel={kernel}: give an odd side of the convolution, or 0 for none")
    if own_tokens and key_grid not in (None, grid):
        raise ValueError(f"own_tokens={own_tokens} beside key_grid={key_grid}: fewer keys are of layers without them")
