"""Agent attention (arXiv 2312.08874) as the training-free preset has it: no mask, another function of q, k, v."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from attn_plugins.ops import agent_attention
from attn_plugins.ops.agent import agent_grid, pool_tokens
from attn_plugins.pipelines.benching.definitions.agents import SampledAgents
from attn_plugins.pipelines.benching.masks.grids import grid_of
from attn_plugins.pipelines.benching.masks.mask import Mask, Shape
from attn_plugins.pipelines.benching.sides import Built, Cannot, Oracle, Setting

RATIO, MOST = 16, 1024  # tokens per agent, and agents
POWER, SHORTCUT = 0.15, 0.075  # the published second scale, D ** -POWER, and share of the values


@dataclass(frozen=True, eq=False)
class Agents(Mask):
    """`to` agents of a grid; pooling them is in the time."""

    shape: Shape
    option: str
    grid: tuple[int, int]
    to: tuple[int, int]
    plain = False

    def seen(self, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("agents stand between queries and keys: no pair is seen")

    @property
    def pairs(self) -> float:
        """Of both steps: agents by keys, and queries by agents."""
        return 2.0 * math.prod(self.to) * self.shape.tokens

    def leaves(self, setting: Setting) -> tuple[torch.Tensor, ...]:
        """q, k, v and the agents, which a side that pools them does not read."""
        q, k, v = smooth(super().leaves(setting), self.grid, self.to)
        return q, k, v, pool_tokens(q, self.grid, self.to, 0)

    def oracle(self, leaves: tuple[torch.Tensor, ...]) -> Oracle:
        dim = leaves[0].shape[-1]
        return SampledAgents(leaves, self.grid, self.to, (dim**-0.5, dim**-POWER), SHORTCUT)

    def operator(self, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> Built:
        scale = setting.head_dim**-POWER

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            agents = pool_tokens(q, self.grid, self.to, 0)
            return agent_attention(
                q, k, v, agents, scale_broadcast=scale, shortcut=SHORTCUT, backend=setting.backend
            )  # fmt: skip

        return Built(run, self.density)


def agents(shape: Shape) -> Agents:
    """A sixteenth of the tokens, 1,024 at most."""
    if shape.heads != shape.kv_heads:
        raise Cannot(f"{shape.heads} heads on {shape.kv_heads}: its check takes as many of both")
    height, width = grid_of(shape.tokens, axes=2)
    to = agent_grid((height, width), max(min(shape.tokens // RATIO, MOST), 1))
    return Agents(shape, f"{math.prod(to)} agents of {height}x{width}", (height, width), to)  # type: ignore[arg-type]


def smooth(
    qkv: tuple[torch.Tensor, ...], grid: tuple[int, int], to: tuple[int, int], before: int = 0
) -> tuple[torch.Tensor, ...]:
    """q, k, v (B, H, N, D) that are alike in each cell, and values that go along with the keys.

    Means of independent queries would be almost 0 and gather almost nothing: a check that says little.
    """
    q, k, v = qkv
    cells = pool_tokens(q, grid, to, before) * RATIO**0.5
    image = F.interpolate(cells.transpose(-1, -2).flatten(0, 1).unflatten(-1, to), size=grid, mode="nearest")
    image = image.flatten(2).unflatten(0, q.shape[:2]).transpose(-1, -2)
    q[:, :, before:] = (0.7 * q[:, :, before:] + image).to(q.dtype)
    return q, k, (v + k).mul_(0.7)
