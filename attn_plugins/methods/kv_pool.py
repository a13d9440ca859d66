"""Pooled keys and values (ToDo, arXiv 2402.13573): every query attends to a coarser grid, and to all text.

Deviations from ToDo: keys and values are means over cells, not every other one; keys are pooled before norm and
rotation; text stays as it is.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins.method import AttentionCall, Method, MethodConfig, Processor, SiteKind
from attn_plugins.methods.pooling import PoolingProcessor, attend_real_tokens, pooled
from attn_plugins.ops.agent import pooled_grid
from attn_plugins.sequence import Sequence


@dataclass(frozen=True)
class KVPoolConfig(MethodConfig):
    """How coarse the keys are.

    Args:
        factor: tokens of the grid that become one, per axis: one for height and width (time is not pooled), or one for
            each axis of the grid.
        log_weights: add log(tokens per pooled key) to the scores of pooled keys, so that text does not gain weight
            beside fewer keys of the grid. Without text it changes nothing.
    """

    factor: Any = 2
    log_weights: bool = False

    def __post_init__(self) -> None:
        factors = self.factor if isinstance(self.factor, tuple) else (self.factor,)
        if not 1 <= len(factors) <= 3 or not all(type(factor) is int and factor >= 1 for factor in factors):
            raise ValueError(f"factor={self.factor!r}: give 1 or more tokens, or 1 or more per axis of the grid")

    def grid(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Keys per axis of a grid.

        Raises:
            ValueError: factors for another number of axes.
        """
        factors = self.factor
        if isinstance(factors, int):
            factors = (1,) * (len(grid) - 2) + (factors,) * min(len(grid), 2)
        if len(factors) != len(grid):
            raise ValueError(f"factor={self.factor} is for {len(factors)} axes, the grid {grid} has {len(grid)}")
        return pooled_grid(grid, factors)


class KVPoolProcessor(PoolingProcessor):
    """Attention of all queries to pooled keys."""

    def __init__(self, config: KVPoolConfig) -> None:
        self.config = config

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        sequence = call.sequence
        assert sequence is not None  # Layer.attend calls no processor without one
        to = self.config.grid(sequence.grid)
        few_k, few_v = pooled(call, "k", to), pooled(call, "v", to)

        def attend(items: slice, real: Sequence, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            before, after = real.text_before, real.text_before + real.tokens
            keys, values = (
                torch.cat([whole[:, :, :before], few[items], whole[:, :, after:]], dim=2)
                for whole, few in ((k, few_k), (v, few_v))
            )
            mask = None
            if self.config.log_weights and real.length > real.tokens:
                mask = q.new_zeros(1, 1, 1, keys.shape[2])
                mask[..., before : before + few_k.shape[2]] = math.log(real.tokens / few_k.shape[2])
            return torch.nn.functional.scaled_dot_product_attention(
                q, keys, values, mask, scale=call.scale, enable_gqa=q.shape[1] != k.shape[1]
            )

        return attend_real_tokens(call, attend)

    def pairs(self, sequence: Sequence) -> int:
        return sequence.length * (math.prod(self.config.grid(sequence.grid)) + sequence.length - sequence.tokens)


class KVPool(Method):
    name = "kv_pool"
    title = "Pooled keys and values"
    kind = "operator"
    paper = "arXiv 2402.13573"
    config_class = KVPoolConfig
    min_tokens = (512, 2048)
    own_settings = frozenset({"factor"})

    def ladder(self, kind: SiteKind, grid: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
        return ({"factor": 2},)

    def processor(
        self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind = "self"
    ) -> Processor | None:
        assert isinstance(config, KVPoolConfig)  # patching makes it with config_class
        return _processor(config)


@functools.lru_cache(maxsize=64)
def _processor(config: KVPoolConfig) -> Processor:
    """One object for equal settings: a compiled model needs a graph for each distinct one."""
    return KVPoolProcessor(config)
