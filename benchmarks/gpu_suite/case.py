"""A problem of the GPU benchmark: a file in benchmarks/gpu_cases/ supplies it, the rest of the suite runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from attn_plugins.pipelines.benching import sides
from attn_plugins.pipelines.benching.sides import BACKWARD, FORWARD, Prepared, Setting


@dataclass(frozen=True)
class Case(ABC):
    """A problem by name. `quick` ones make up the short run; `marks`: (pass, aim) for the share of ideal."""

    name: str
    tokens: int
    heads: int
    batch: int = 1
    kv_heads: int | None = None
    head_dims: tuple[int, ...] = (64, 128)
    quick: bool = False
    suite: str = "block_sparse"
    marks: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {FORWARD: (0.8, 0.9), BACKWARD: (0.7, 0.8)}
    )

    @property
    @abstractmethod
    def shape(self) -> str:
        """What the tokens are, for the table: "30x48x80 + 512"."""

    @property
    @abstractmethod
    def option(self) -> str:
        """What the method is asked for, for the table: "window 18x24x24 stride 16x8x8"."""

    @abstractmethod
    def shrunk(self) -> Case:
        """The same kind of problem, small enough to run in a second on a CPU: for the dry run."""

    @abstractmethod
    def prepare(self, setting: Setting) -> Prepared:
        """Make inputs and sides on the setting's device."""


def times(values: tuple[int, ...]) -> str:
    return "x".join(map(str, values))


def random_qkv(case: Case, setting: Setting, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """q, k, v of the case's shape: (B, H, N, D) views of (B, N, H, D)."""
    return sides.random_qkv(case.batch, case.tokens, case.heads, case.kv_heads or case.heads, setting, seed)
