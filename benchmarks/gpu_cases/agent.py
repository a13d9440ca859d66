"""Agent attention (arXiv 2312.08874): training-free on square grids as its preset sets it, and trained, with biases."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from attn_plugins.ops import agent_attention
from attn_plugins.ops.agent import agent_grid, depthwise, pool_tokens
from attn_plugins.pipelines.benching.backends.dense import dense_sides
from attn_plugins.pipelines.benching.definitions.agents import SampledAgents
from attn_plugins.pipelines.benching.masks.agents import MOST, POWER, RATIO, SHORTCUT, smooth
from attn_plugins.pipelines.benching.sides import FORWARD, TRAINING, Built, Prepared, Setting, Side
from benchmarks.gpu_suite.case import Case, random_qkv, times


@dataclass(frozen=True, kw_only=True)
class AgentCase(Case):
    """`agents` of a square grid. "ours" pools them from the queries, the part "agents given" does not; the peer "two
    sdpa" pools them likewise and leaves both steps to the kernel that PyTorch chooses.

    `trained`: a class token before the grid, biases of both steps, a 3 x 3 convolution of the values and their
    gradients, with neither the second scale nor the shortcut of the training-free form.
    """

    side: int
    agents: int
    trained: bool = False
    suite: str = "agent"

    @property
    def shape(self) -> str:
        return times((self.side, self.side)) + (" + 1" if self.trained else "")

    @property
    def option(self) -> str:
        return f"{math.prod(self.to)} agents" + (", biases, convolution" if self.trained else "")

    @property
    def grid(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def to(self) -> tuple[int, int]:
        return agent_grid(self.grid, self.agents)  # type: ignore[return-value]

    @property
    def density(self) -> float:
        """Pairs of both steps over those of dense attention, 2 n N / N ** 2: `share` is the speed-up over N / (2 n)."""
        return 2 * math.prod(self.to) / self.tokens

    def shrunk(self) -> AgentCase:
        return replace(
            self, side=13, agents=max(4, 169 * self.agents // self.side**2), tokens=169 + int(self.trained), heads=2,
            batch=min(self.batch, 2), head_dims=(16,),
        )  # fmt: skip

    def prepare(self, setting: Setting) -> Prepared:
        before = self.tokens - self.side**2
        q, k, v = smooth(random_qkv(self, setting), self.grid, self.to, before)
        leaves = q, k, v, pool_tokens(q, self.grid, self.to, before), *(self._weights(q) if self.trained else ())
        power, shortcut = (0.5, 0.0) if self.trained else (POWER, SHORTCUT)
        scale = setting.head_dim**-power

        def given(q, k, v, agents, bias_aggregate=None, bias_broadcast=None, dwc_weight=None, dwc_bias=None):  # type: ignore[no-untyped-def]
            return agent_attention(
                q, k, v, agents, scale_broadcast=scale, bias_aggregate=bias_aggregate, bias_broadcast=bias_broadcast,
                shortcut=shortcut, dwc_weight=dwc_weight, dwc_bias=dwc_bias,
                grid=self.grid if self.trained else None, backend=setting.backend,
            )  # fmt: skip

        def ours(q, k, v, _, *weights):  # type: ignore[no-untyped-def]
            return given(q, k, v, pool_tokens(q, self.grid, self.to, before), *weights)

        def two_sdpa(q, k, v, _, bias_aggregate=None, bias_broadcast=None, dwc_weight=None, dwc_bias=None):  # type: ignore[no-untyped-def]
            agents = pool_tokens(q, self.grid, self.to, before)
            gathered = F.scaled_dot_product_attention(agents, k, v, attn_mask=bias_aggregate)
            out = F.scaled_dot_product_attention(q, agents, gathered, attn_mask=bias_broadcast, scale=scale)
            if dwc_weight is None:
                return out + shortcut * v
            texture = depthwise(v[:, :, before:], self.grid, dwc_weight, dwc_bias)
            return out + F.pad(texture, (0, 0, before, 0))

        sides = (
            *(replace(side, build=lambda build=side.build: _of_qkv(build())) for side in dense_sides(setting.device)),  # type: ignore[misc]
            Side("two sdpa", "peer", lambda: Built(two_sdpa, self.density)),
            Side("agents given", "part", lambda: Built(given, self.density)),
            Side("ours", "ours", lambda: Built(ours, self.density)),
        )
        scales = (setting.head_dim**-0.5, scale)
        oracle = SampledAgents(leaves, self.grid, self.to, scales, shortcut)
        return Prepared(leaves, torch.randn_like(q), oracle, sides, self.density)

    def _weights(self, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Both biases, the convolution's weight and its bias, as `agent_attention` takes them."""
        generator = torch.Generator(q.device).manual_seed(3)
        count, channels = math.prod(self.to), self.heads * q.shape[3]
        shapes = (
            (1, self.heads, count, self.tokens), (1, self.heads, self.tokens, count), (channels, 1, 3, 3), (channels,),
        )  # fmt: skip
        made = (torch.randn(shape, generator=generator, device=q.device) for shape in shapes)
        return tuple((t * size).to(q.dtype) for t, size in zip(made, (1.0, 1.0, 0.1, 0.1), strict=True))


def _of_qkv(built: Built) -> Built:
    """Dense attention has no use for the rest."""
    return Built(lambda q, k, v, *_: built.run(q, k, v), built.density)


MARKS = {FORWARD: (0.85, 0.95), TRAINING: (0.85, 0.95)}


def _case(name: str, side: int, heads: int, batch: int = 1, agents: int = 0, **more) -> AgentCase:  # type: ignore[no-untyped-def]
    agents = agents or min(side**2 // RATIO, MOST)
    return AgentCase(name, side**2, heads, batch, side=side, agents=agents, **{"marks": MARKS} | more)


# Heads and batches of models, fewer on the large grids: two items are a guided image, 10 heads SDXL's, 8 those of
# Stable Diffusion 1.5, 12 those of Wan 1.3B. The trained rows are Agent-DeiT-T's, as trained and on a larger image:
# N / (2 n) is 2 there, and a convolution comes on top, so that they have no mark.
CASES = (
    _case("agent-4k", 64, 10, 2, quick=True),
    _case("agent-9k", 96, 10, 2),
    _case("agent-16k", 128, 10),
    _case("agent-37k", 192, 12, quick=True),
    _case("agent-66k", 256, 12),
    _case("agent-37k-256", 192, 12, agents=256),
    _case("agent-66k-256", 256, 12, agents=256),
    _case("agent-sd15-4k", 64, 8, 2, head_dims=(40,)),
    _case("agent-sd15-9k", 96, 8, 2, head_dims=(40,)),
    AgentCase("agent-deit-197", 197, 3, 256, head_dims=(64,), side=14, agents=49, trained=True, marks={}),
    AgentCase("agent-deit-4k", 4097, 3, 8, head_dims=(64,), side=64, agents=49, trained=True, marks={}),
)
