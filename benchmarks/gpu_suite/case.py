"""What one measured problem is made of: a file in benchmarks/gpu_cases/ supplies it, the rest of the suite runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

Run = Callable[..., torch.Tensor]  # the case's leaves to the output

FORWARD, BACKWARD, TRAINING = "fwd", "bwd", "fwd+bwd"
DIRECTIONS = (FORWARD, BACKWARD, TRAINING)


@dataclass(frozen=True)
class Setting:
    """On what a case is measured. `tiny` is the dry run: small enough for a CPU and a unit test."""

    dtype: torch.dtype
    head_dim: int
    device: torch.device
    tiny: bool = False

    @property
    def backend(self) -> str:
        """Ours, by name: what is measured is never chosen by "auto"."""
        return "triton" if self.device.type == "cuda" else "cpu"


@dataclass(frozen=True)
class Built:
    """An implementation with its index made. `density`: its share of the dense work, -1 where it does not say."""

    run: Run
    density: float = -1.0


@dataclass(frozen=True)
class Side:
    """One implementation of a case.

    Args:
        role: "dense" (the baseline is the fastest of these), "peer" (the same result as ours), "ours", or "part" (ours
            with something of it done beforehand: what is left is the time of that).
        build: makes whatever depends on the mask alone. Raises where this side cannot run the case; the text of the
            error becomes the row's note.
        lazy: the index is made by the first call rather than by `build`.
    """

    name: str
    role: str
    build: Callable[[], Built]
    lazy: bool = False


@dataclass(frozen=True)
class Verdict:
    """Error and allowance by name of a result ("out", "dq", ...); the side is right if every error is allowed."""

    errors: Mapping[str, tuple[float, float]]

    @property
    def right(self) -> bool:
        return all(error <= allowed for error, allowed in self.errors.values())  # False for nan

    @property
    def worst(self) -> tuple[str, float, float]:
        """Name, error and allowance of the result nearest to its limit, or farthest beyond."""

        def strain(row: tuple[str, tuple[float, float]]) -> float:
            error, allowed = row[1]
            return error / max(allowed, 1e-300) if error == error else float("inf")

        name, (error, allowed) = max(self.errors.items(), key=strain)
        return name, error, allowed


class Oracle(Protocol):
    """Knows the right result of a case, at least of a part of it that a wrong kernel cannot all get right."""

    def judge(self, run: Run, gradients: bool) -> Verdict:
        """Run once, on the case's leaves, and compare; with `gradients` those of every leaf too."""


@dataclass(frozen=True)
class Prepared:
    """A case on a device: inputs, the gradient of the output for the timed backward, oracle and sides.

    `work`: the least share of the dense work that the case needs (for a mask: its pairs over all pairs).
    """

    leaves: tuple[torch.Tensor, ...]
    upstream: torch.Tensor
    oracle: Oracle
    sides: tuple[Side, ...]
    work: float


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
    """q, k, v as (B, H, N, D) views of (B, N, H, D), the layout that projections leave behind. Never zeros."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    heads = (case.heads, case.kv_heads or case.heads, case.kv_heads or case.heads)
    return tuple(
        torch.randn(
            case.batch, case.tokens, count, setting.head_dim,
            generator=generator, device=setting.device, dtype=setting.dtype,
        ).transpose(1, 2)
        for count in heads
    )  # fmt: skip
