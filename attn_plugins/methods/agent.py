"""Agent Attention (arXiv 2312.08874): a few agents gather from all keys, and all queries read the agents.

Agents are means of the queries over cells of the grid, n of N tokens; the cost is 2 n / N of dense attention's. This is
the form for models that were trained without agents: no biases, the scores of the second step scaled by D^-0.15, which
makes up for the blur of few agents, and 0.075 of the values added. Text is exact.

Deviations from the authors' patch of Stable Diffusion: agents are pooled before norm and rotation, text has rows of its
own, layers are chosen by their number of tokens.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins.method import AttentionCall, Method, MethodConfig, Processor, SiteKind
from attn_plugins.methods.pooling import PoolingProcessor, attend_real_tokens, pooled
from attn_plugins.ops import agent_attention
from attn_plugins.ops.agent import agent_grid
from attn_plugins.ops.checks import resolve_scale
from attn_plugins.sequence import Sequence


@dataclass(frozen=True)
class AgentConfig(MethodConfig):
    """How many agents, and how they are read.

    Args:
        ratio: agents per token of the grid.
        agents: their number instead, or their number per axis of the grid; None: by `ratio`.
        power: the scores of the second step are scaled by D ** -power (a model's own scale is of power 0.5).
        shortcut: this times v is added to every row of the grid.
        backend: of the operator.
    """

    ratio: float = 1 / 16
    agents: Any = None
    power: float = 0.15
    shortcut: float = 0.075
    backend: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio!r}: give agents per token, in (0, 1]")
        numbers = self.agents if isinstance(self.agents, tuple) else (self.agents,)
        if self.agents is not None and not (
            1 <= len(numbers) <= 3 and all(type(number) is int and number >= 1 for number in numbers)
        ):
            raise ValueError(f"agents={self.agents!r}: give 1 or more, or 1 or more per axis of the grid, or None")

    def grid(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Agents per axis on a grid.

        Raises:
            ValueError: `agents` are of another number of axes.
        """
        if isinstance(self.agents, tuple):
            if len(self.agents) != len(grid):
                raise ValueError(
                    f"agents={self.agents} are of {len(self.agents)} axes, the grid {grid} has {len(grid)}"
                )
            return tuple(min(few, many) for few, many in zip(self.agents, grid, strict=True))
        return agent_grid(grid, self.agents or max(1, round(self.ratio * math.prod(grid))))


class AgentProcessor(PoolingProcessor):
    """Agent attention, training-free."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config

    def refuses(self, call: AttentionCall) -> str | None:
        sequence = call.sequence
        if sequence is not None and self._loses(sequence):
            agents = math.prod(self.config.grid(sequence.grid))
            return f"{agents} agents for {sequence.tokens} tokens cost no less than dense attention"
        return super().refuses(call)

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        config, sequence, dim = self.config, call.sequence, call.q.shape[-1]
        assert sequence is not None  # Layer.attend calls no processor without one
        agents = pooled(call, "q", config.grid(sequence.grid))
        scale = resolve_scale(call.scale, dim)

        def attend(items: slice, real: Sequence, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return agent_attention(
                q, k, v, agents[items], scale_aggregate=scale, scale_broadcast=scale * dim ** (0.5 - config.power),
                shortcut=config.shortcut, exact_before=real.text_before, exact_after=real.text_after,
                backend=config.backend,
            )  # fmt: skip

        return attend_real_tokens(call, attend)

    def pairs(self, sequence: Sequence) -> int:
        if self._loses(sequence):
            return sequence.length**2
        agents, text = math.prod(self.config.grid(sequence.grid)), sequence.length - sequence.tokens
        return agents * (sequence.length + sequence.tokens) + text * sequence.length

    def _loses(self, sequence: Sequence) -> bool:
        return 2 * math.prod(self.config.grid(sequence.grid)) >= sequence.tokens


class Agent(Method):
    name = "agent"
    title = "Agent attention, training-free"
    kind = "operator"
    paper = "arXiv 2312.08874"
    config_class = AgentConfig
    min_tokens = (512, 2048)
    own_settings = frozenset({"ratio", "agents"})

    def ladder(self, kind: SiteKind, grid: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
        return ({"ratio": 0.125}, {"ratio": 0.0625})

    def processor(
        self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind = "self"
    ) -> Processor | None:
        assert isinstance(config, AgentConfig)  # patching makes it with config_class
        return _processor(config)


@functools.lru_cache(maxsize=64)
def _processor(config: AgentConfig) -> Processor:
    """One object for equal settings: a compiled model needs a graph for each distinct one."""
    return AgentProcessor(config)
