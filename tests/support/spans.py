"""Random problems of `span_attention`, and its rule one query at a time; the seed is the case number."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Problem:
    """q, k, v and the options of `span_attention`. Tokens that are padding are NaN."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(*(t.to(dtype) for t in (self.q, self.k, self.v)), self.options)

    def items(self) -> list[tuple[int, int, int]]:
        """(index of the first query, of the first real token, of the first token behind the real ones) of each item."""
        queries, keys = self.q.shape[2], self.k.shape[2]
        starts = self.options.get("query_start")
        starts = keys - queries if starts is None else starts
        lengths = self.options.get("lengths")
        lengths = keys if lengths is None else lengths
        found = []
        for b in range(len(self.q)):
            start = starts if isinstance(starts, int) else int(starts[b])
            length = lengths if isinstance(lengths, int) else lengths[b]
            before, valid = length if isinstance(length, (list, tuple)) else (0, int(length))
            found.append((start, before, before + valid))
        return found

    def mask(self) -> torch.Tensor:
        """(B, H, N, N_kv) bool."""
        heads, queries, keys = self.q.shape[1], self.q.shape[2], self.k.shape[2]
        spans = self.options["spans"]
        spans = [spans] * heads if isinstance(spans, int) else list(spans)
        mask = torch.zeros(len(self.q), heads, queries, keys, dtype=torch.bool)
        for b, (start, first, end) in enumerate(self.items()):
            for h in range(heads):
                span = spans[h * len(spans) // heads]
                for n in range(queries):
                    if not first <= start + n < end:
                        continue
                    i, j = start + n - first, torch.arange(start + n - first + 1)
                    mask[b, h, n, first : first + i + 1] = self._sees(i, j, span)
        return mask

    def _sees(self, i: int, j: torch.Tensor, span: int) -> torch.Tensor:
        """Which keys at j <= i the query at i sees."""
        sink = self.options.get("sink", 0)
        if self.options.get("granularity") == "block":
            return (j // 64 < sink / 64) | (i // 64 - j // 64 < span / 64)
        return (j < sink) | (i - j < span)


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_qkv(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [draw((batch, *shape, dim), seed, dtype) for seed, shape in enumerate(shapes)]


def random_problem(seed: int, longest: int = 210) -> Problem:
    """Chunks of a prefill or all of it; GQA; spans by head; sinks; both granularities; padding on either side."""
    dice = random.Random(seed)
    batch, kv_heads, group = dice.randint(1, 2), dice.randint(1, 2), dice.choice([1, 1, 2, 3])
    keys = dice.choice([1, 2, dice.randint(3, 66), dice.randint(64, longest)])
    queries = dice.choice([keys, keys, dice.randint(1, keys)])
    heads = kv_heads * group

    def span() -> int:
        return dice.choice([0, 1, 64, keys - 1, keys, keys + 7, dice.randint(0, keys), dice.randint(0, keys)])

    options: dict[str, Any] = {"spans": [span(), [span() for _ in range(dice.choice([kv_heads, heads]))]][seed % 2]}
    options["sink"] = dice.choice([0, 0, 1, 4, 64, dice.randint(0, keys + 2)])
    options["granularity"] = dice.choice(["token", "token", "block"])
    if dice.random() < 0.3:
        options["query_start"] = dice.choice([0, [dice.randint(0, keys - queries) for _ in range(batch)]])
    kind = dice.random()
    if kind < 0.2:
        options["lengths"] = [dice.choice([0, keys, dice.randint(0, keys)]) for _ in range(batch)]
    elif kind < 0.4:
        ends = [sorted((dice.randint(0, keys), dice.randint(0, keys))) for _ in range(batch)]
        options["lengths"] = [[a, b - a] for a, b in ends]
    dim = dice.choice([4, 8, 12])
    q, k, v = (draw((batch, n, h, dim), 3 * seed + i).transpose(1, 2) for i, (n, h) in
               enumerate([(queries, heads), (keys, kv_heads), (keys, kv_heads)]))  # fmt: skip
    if dice.random() < 0.5:
        q, k, v = (t.contiguous() for t in (q, k, v))
    problem = Problem(q, k, v, options)
    for b, (start, first, end) in enumerate(problem.items()):
        for t in (k[b], v[b]):
            t[:, :first] = t[:, end:] = float("nan")
        q[b, :, : max(first - start, 0)] = float("nan")
        q[b, :, max(end - start, 0) :] = float("nan")
    return problem
