"""Random neighborhood problems; the seed is the case number."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch

from tests.support.rule import rule_mask

LONGEST = {1: 96, 2: 18, 3: 8}  # by number of axes
NAMES = ("window", "stride", "dilation", "causal")


@dataclass
class Problem:
    """q, k, v and the options of `neighborhood_attention`; `rows`: the setting of each head (one if they share)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grid: tuple[int, ...]
    rows: list[dict[str, tuple[Any, ...]]]
    text_before: Any
    text_after: Any

    @property
    def options(self) -> dict[str, Any]:
        alike = len(self.rows) == 1
        setting = {name: self.rows[0][name] if alike else [row[name] for row in self.rows] for name in NAMES}
        return {"grid": self.grid, **setting, "text_before": self.text_before, "text_after": self.text_after}

    def mask(self) -> torch.Tensor:
        """(B, H or 1, N, N) bool, from the rule pair by pair."""
        texts = [_rows(text, len(self.q)) for text in (self.text_before, self.text_after)]
        items = [
            torch.stack([rule_mask(self.grid, *(row[name] for name in NAMES), *ends) for row in self.rows])
            for ends in zip(*texts, strict=True)
        ]
        return torch.stack(items)

    def __repr__(self) -> str:
        return f"{self.options}, q {tuple(self.q.shape)} strides {self.q.stride()}, k {tuple(self.k.shape)}"


def random_problem(seed: int, dtype: torch.dtype = torch.float64) -> Problem:
    """1 to 3 axes, ragged, some of size 1; every option; text and padding on both sides; GQA; either memory layout."""
    dice = random.Random(seed)
    axes = dice.randint(1, 3)
    grid = tuple(1 if dice.random() < 0.1 else dice.randint(1, LONGEST[axes]) for _ in range(axes))
    batch, kv_heads = dice.randint(1, 3), dice.randint(1, 3)
    heads = kv_heads * dice.randint(1, 3)
    head_dim = dice.choice([40, 72]) if dice.random() < 0.05 else dice.choice([4, 5, 8, 12, 16])
    per_head = dice.random() < 0.15
    rows = [_setting(dice, grid) for _ in range(heads if per_head else 1)]
    before, after = _text(dice, batch), _text(dice, batch)
    tokens = math.prod(grid) + sum(_rows(text, batch)[0][0] for text in (before, after))
    rng = torch.Generator().manual_seed(seed)
    swapped = dice.random() < 0.5  # the layout of a projection's output, which diffusers hands over

    def draw(count: int) -> torch.Tensor:
        shape = (batch, tokens, count, head_dim) if swapped else (batch, count, tokens, head_dim)
        t = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
        return t.transpose(1, 2) if swapped else t

    return Problem(draw(heads), draw(kv_heads), draw(kv_heads), grid, rows, before, after)


def _setting(dice: random.Random, grid: tuple[int, ...]) -> dict[str, tuple[Any, ...]]:
    columns = []
    for size in grid:
        dilation = dice.choice([1, dice.randint(1, min(size, 4))])
        most = size // dilation
        window = dice.randint(1, most)
        stride = dice.choice([1, window, dice.randint(1, window)])
        if dice.random() < 0.15:
            window, stride = -1, dice.randint(1, most)
        columns.append((window, stride, dilation, dice.random() < 0.3))
    return dict(zip(NAMES, zip(*columns, strict=True), strict=True))


def _text(dice: random.Random, batch: int) -> Any:
    length = dice.choice([0, 0, 1, 5, 17])
    if not length or dice.random() < 0.5:
        return length
    return [[length, dice.choice([0, length, dice.randint(0, length)])] for _ in range(batch)]


def _rows(text: Any, batch: int) -> list[tuple[int, int]]:
    return [(text, text)] * batch if isinstance(text, int) else [(length, valid) for length, valid in text]
