"""VMoBA's choice from the coordinates of tokens, row by row: written from the paper's text, for one batch item."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Problem:
    """q, k, v and the options of `vmoba_attention`, with `tile` as sizes per axis."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict[str, Any]

    def mask(self) -> torch.Tensor:
        """(B, H, N, N) bool."""
        items = []
        for b in range(len(self.q)):
            ends = [_item(self.options.get(side, 0), b) for side in ("text_before", "text_after")]
            items.append(torch.stack([self._head(b, h, *ends) for h in range(self.q.shape[1])]))
        return torch.stack(items)

    def _head(self, b: int, h: int, before: tuple[int, int], after: tuple[int, int]) -> torch.Tensor:
        grid = self.options["grid"]
        tokens = math.prod(grid)
        here = slice(before[0], before[0] + tokens)
        keys = self.k[b, h // (self.q.shape[1] // self.k.shape[1]), here].detach()
        real = torch.zeros(self.q.shape[2], dtype=torch.bool)
        real[: before[1]] = real[here] = real[here.stop : here.stop + after[1]] = True
        mask = real[:, None] & real[None, :]
        mask[here, here] = chosen(self.q[b, h, here].detach(), keys, **{**DEFAULTS, **self.options})
        return mask

    def __repr__(self) -> str:
        return f"{self.options}, q {tuple(self.q.shape)}, k {tuple(self.k.shape)}"


DEFAULTS = {
    "rule": "topk", "scope": "query", "k_blocks": None, "tau": None, "exact": False, "tile": None, "min_blocks": 1,
    "max_blocks": None,
}  # fmt: skip


def chosen(  # type: ignore[no-untyped-def]
    q, k, grid, block, rule, scope, k_blocks, tau, exact, tile, min_blocks, max_blocks, **_
) -> torch.Tensor:
    """(tokens, tokens) bool from q and k (tokens, D) of one head."""
    cells = list(itertools.product(*map(range, grid)))
    block = [length if size == -1 else size for size, length in zip(block, grid, strict=True)]
    tile = block if tile is None else tile
    block_of = [tuple(x // size for x, size in zip(cell, block, strict=True)) for cell in cells]
    inner = [tuple(x % b // t for x, b, t in zip(cell, block, tile, strict=True)) for cell in cells]
    row_of = cells if exact else [a + b for a, b in zip(block_of, inner, strict=True)]
    blocks, rows = sorted(set(block_of)), sorted(set(row_of))
    own = {row: block_of[row_of.index(row)] for row in rows}

    def mean(t: torch.Tensor, groups: list[Any], group: Any) -> torch.Tensor:
        return t[[i for i, one in enumerate(groups) if one == group]].double().mean(0)

    keys = {j: mean(k, block_of, j) for j in blocks}
    score = {(r, j): float(mean(q, row_of, r) @ keys[j]) for r in rows for j in blocks}
    scopes = [[row] for row in rows] if scope == "query" else [rows]
    kept = {row: {own[row]} for row in rows}
    for members in scopes:
        pairs = sorted(((r, j) for r in members for j in blocks), key=lambda pair: -score[pair])
        others = [(r, j) for r, j in pairs if j != own[r]]
        if rule == "topk":
            count = (min(k_blocks, len(blocks)) - 1) * len(members)
        elif tau >= 1:
            count = len(others)
        else:
            low, high = score[pairs[-1]], score[pairs[0]]
            if rule == "threshold":
                weight = {p: (score[p] - low) / (high - low) if high > low else 1.0 for p in pairs}
            else:
                weight = {p: math.exp((score[p] - high) * q.shape[-1] ** -0.5) for p in pairs}
            sums = itertools.accumulate([weight[p] for p in others], initial=sum(weight[r, own[r]] for r in members))
            count = next((n for n, s in enumerate(sums) if s >= tau * sum(weight.values())), len(others))
        for r, j in others[:count]:
            kept[r].add(j)
    for r in rows:
        ranks = [own[r], *sorted((j for j in blocks if j != own[r]), key=lambda j: -score[r, j])]
        kept[r] = set(ranks[: min(max(len(kept[r]), min_blocks), max_blocks or len(blocks))])
    return torch.tensor([[block_of[j] in kept[row_of[i]] for j in range(len(cells))] for i in range(len(cells))])


def random_problem(seed: int, dtype: torch.dtype = torch.float64, **fixed: Any) -> Problem:
    """1 to 3 axes, ragged, blocks longer than axes, every rule, scope and bound, text, padding, GQA, both layouts."""
    dice = random.Random(seed)
    axes = dice.randint(1, 3)
    grid = tuple(dice.randint(1, {1: 60, 2: 10, 3: 5}[axes]) for _ in range(axes))
    block = tuple(dice.choice([-1, dice.randint(1, size + 1), dice.randint(1, (size + 1) // 2)]) for size in grid)
    batch, kv_heads = dice.randint(1, 2), dice.randint(1, 2)
    heads = kv_heads * dice.randint(1, 2)
    options: dict[str, Any] = {
        "grid": grid, "block": block, "rule": dice.choice(["topk", "threshold", "top_p"]),
        "scope": dice.choice(["query", "head"]), "exact": dice.random() < 0.5,
        "tile": dice.choice([None, tuple(dice.randint(1, 3) for _ in grid)]),
        "min_blocks": dice.choice([1, 1, 2, 3]), "max_blocks": dice.choice([None, None, 3, 4]),
        "text_before": _text(dice, batch), "text_after": _text(dice, batch),
    }  # fmt: skip
    options |= (
        {"k_blocks": dice.randint(1, 6)} if options["rule"] == "topk" else {"tau": dice.choice([0.1, 0.4, 0.8, 1.0])}
    )
    options |= fixed
    tokens = math.prod(grid) + sum(_item(options[side], 0)[0] for side in ("text_before", "text_after"))
    rng = torch.Generator().manual_seed(seed)
    swapped = dice.random() < 0.5  # the layout of a projection's output, which diffusers hands over

    def draw(count: int) -> torch.Tensor:
        shape = (batch, tokens, count, 8) if swapped else (batch, count, tokens, 8)
        t = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
        return t.transpose(1, 2) if swapped else t

    return Problem(draw(heads), draw(kv_heads), draw(kv_heads), options)


def _text(dice: random.Random, batch: int) -> Any:
    length = dice.choice([0, 0, 1, 5])
    if not length or dice.random() < 0.5:
        return length
    return [[length, dice.choice([0, length, dice.randint(0, length)])] for _ in range(batch)]


def _item(text: Any, index: int) -> tuple[int, int]:
    """(length, valid) of one batch item."""
    return (text, text) if isinstance(text, int) else (text[index][0], text[index][1])
