"""What one measured problem is made of: inputs, an oracle, and sides that all compute it or stand beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Run = Callable[..., torch.Tensor]  # the case's leaves to the output

FORWARD, BACKWARD, TRAINING = "fwd", "bwd", "fwd+bwd"
DIRECTIONS = (FORWARD, BACKWARD, TRAINING)
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


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


class Cannot(ValueError):
    """A side that cannot run a problem; the text is the reason, and becomes the row's note."""


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


def random_qkv(
    batch: int, tokens: int, heads: int, kv_heads: int, setting: Setting, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """q, k, v as (B, H, N, D) views of (B, N, H, D), the layout that projections leave behind. Never zeros."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    return tuple(
        torch.randn(
            batch, tokens, count, setting.head_dim, generator=generator, device=setting.device, dtype=setting.dtype
        ).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads)
    )
