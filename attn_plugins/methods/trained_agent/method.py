"""Agent Attention with weights (arXiv 2312.08874): biases of both steps and a convolution of the values, to be trained.

All zero at first, so that a dense checkpoint begins as plain agent attention, and loses accuracy until it is tuned. Own
tokens (class, distillation, registers) are read and read agents as the authors' do, under biases of their own; none of
them is exact.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attn_plugins.method import AttentionCall, Method, MethodConfig, Processor, SiteKind, SiteShape
from attn_plugins.methods.pooling import PoolingProcessor, attend_real_tokens, pooled
from attn_plugins.methods.trained_agent.weights import AgentWeights, agents_per_axis
from attn_plugins.ops.checks import resolve_scale
from attn_plugins.sequence import Sequence


@dataclass(frozen=True)
class TrainedAgentConfig(MethodConfig):
    """How many agents, and which weights they have.

    Args:
        agents: their number (a square one stands in a square), or their number per axis of the grid.
        bias: biases of both steps: a coarse block, a line for each axis, own tokens.
        block: side of the coarse block.
        kernel: side of the convolution of the values, odd; 0: none.
        power: the scores of the second step are scaled by D ** -power (0.5: as the first, and as the authors train).
        shortcut: this times v is added to every row at the start, as the middle of the convolution, so it is trained.
        backend: of the operator.
    """

    agents: Any = 49
    bias: bool = True
    block: int = 7
    kernel: int = 3
    power: float = 0.5
    shortcut: float = 0.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        numbers = self.agents if isinstance(self.agents, tuple) else (self.agents,)
        if not (1 <= len(numbers) <= 3 and all(type(number) is int and number >= 1 for number in numbers)):
            raise ValueError(f"agents={self.agents!r}: give 1 or more, or 1 or more per axis of the grid")
        if type(self.block) is not int or self.block < 1:
            raise ValueError(f"block={self.block!r}: give the side of the coarse biases, 1 or more (the authors' is 7)")
        if type(self.kernel) is not int or self.kernel < 0 or (self.kernel and self.kernel % 2 == 0):
            raise ValueError(f"kernel={self.kernel!r}: give an odd side of the convolution, or 0 for none")
        if self.shortcut and not self.kernel:
            raise ValueError(
                f"shortcut={self.shortcut!r} is the middle of the convolution, and kernel=0 is without one"
            )

    def grid(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Agents per axis, for a layer that is made for this grid.

        Raises:
            ValueError: `agents` are of another number of axes.
        """
        if isinstance(self.agents, tuple) and len(self.agents) != len(grid):
            raise ValueError(f"agents={self.agents} are of {len(self.agents)} axes, the grid {grid} has {len(grid)}")
        return agents_per_axis(self.agents, grid)


class TrainedAgentProcessor(PoolingProcessor):
    """Agent attention by the weights that a layer holds."""

    def __init__(self, config: TrainedAgentConfig) -> None:
        self.config = config

    def refuses(self, call: AttentionCall) -> str | None:
        sequence = call.sequence
        if call.weights is None:
            return "this layer has lost its agents' weights: patch the model again"
        if sequence is not None and sequence.text_after and not sequence.padded:
            return f"{sequence.text_after} tokens after the grid, of which the agents' biases know nothing"
        return super().refuses(call)

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        config, weights = self.config, call.weights
        assert call.sequence is not None and weights is not None  # Layer.attend and `refuses`
        scale = resolve_scale(call.scale, call.q.shape[-1])
        repeated = any(few > many for few, many in zip(weights.agents, call.sequence.grid, strict=True))
        agents = None if repeated else pooled(call, "q", weights.agents)

        def attend(items: slice, real: Sequence, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            found = None if agents is None else agents[items]
            return weights(
                q, k, v, real.grid, agents=found, scale=scale, power=config.power, backend=config.backend
            )  # fmt: skip

        return attend_real_tokens(call, attend)

    def pairs(self, sequence: Sequence) -> int:
        agents = self.config.agents if isinstance(self.config.agents, tuple) else (self.config.agents,)
        return 2 * math.prod(agents) * sequence.length


class TrainedAgent(Method):
    name = "trained_agent"
    title = "Agent attention with trained biases and convolution"
    kind = "module"
    paper = "arXiv 2312.08874"
    config_class = TrainedAgentConfig
    sites = frozenset({"self"})
    needs_grid = True

    def processor(
        self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind = "self"
    ) -> Processor | None:
        assert isinstance(config, TrainedAgentConfig)  # patching makes it with config_class
        return _processor(config)

    def weights(self, config: MethodConfig, shape: SiteShape, layer_index: int) -> nn.Module | None:
        assert isinstance(config, TrainedAgentConfig)  # patching makes it with config_class
        assert isinstance(shape.grid, tuple)  # needs_grid
        made = AgentWeights(
            shape.heads, shape.head_dim, grid=shape.grid, agents=config.grid(shape.grid), own_tokens=shape.own_tokens,
            block=config.block, kernel=config.kernel, bias=config.bias,
        )  # fmt: skip
        if config.shortcut and made.dwc is not None:
            with torch.no_grad():
                taps = made.dwc.weight.flatten(2)  # of an odd kernel, whose middle is the middle of the row
                taps[:, 0, taps.shape[2] // 2] = config.shortcut
        return made


@functools.lru_cache(maxsize=64)
def _processor(config: TrainedAgentConfig) -> Processor:
    """One object for equal settings: a compiled model needs a graph for each distinct one."""
    return TrainedAgentProcessor(config)
