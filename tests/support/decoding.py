"""Random problems of `decode_attention`, and its rule one (query, token) pair at a time; seed = case number."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from tests.support.tolerance import sdpa


@dataclass
class Problem:
    """q, k, v and the options of `decode_attention`. Tokens that no one may read are NaN."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(*(t.to(dtype) for t in (self.q, self.k, self.v)), self.options)

    def mask(self) -> torch.Tensor:
        """(B, H, Nq, total) bool."""
        batch, heads, queries, _ = self.q.shape
        ranges, keys = self.options["ranges"].tolist(), self.options.get("key_positions")
        mask = torch.zeros(batch, heads, queries, self.k.shape[1], dtype=torch.bool)
        for b in range(batch):
            rows = ranges[b % len(ranges)]
            for h in range(heads):
                kept = [t for start, end in rows[h * len(rows) // heads] for t in range(start, end)]
                for n in range(queries):
                    for t in kept:
                        mask[b, h, n, t] = keys is None or self._sees(b, h, n, t)
        return mask

    def _sees(self, b: int, h: int, n: int, t: int) -> bool:
        keys, queries = self.options["key_positions"], self.options["query_positions"]
        j, i = int(keys[b % len(keys), t]), int(queries[b % len(queries), n])
        if j < 0 or j > i:
            return False
        spans = self.options["spans"]
        if spans is None or j < self.options["sink"]:
            return True
        spans = [spans] if isinstance(spans, int) else spans
        return i - j < int(spans[h * len(spans) // self.q.shape[1]])

    def pytorchs(self) -> torch.Tensor:
        """What PyTorch makes of it in this precision: masked attention over all tokens."""
        k, v = (t.nan_to_num(0.0)[:, None] for t in (self.k, self.v))
        scale = self.options.get("scale")
        return sdpa(self.q, k, v, self.mask(), scale)


def random_problem(seed: int, head_dim: int | None = None, longest: int = 40) -> Problem:
    """Ragged rings in any order, some empty, with gaps of NaN; GQA; every way to give positions, spans and sinks."""
    dice = random.Random(seed)
    rng = torch.Generator().manual_seed(seed)
    batch, kv_heads, queries = dice.randint(1, 3), dice.randint(1, 3), dice.choice([1, 1, 2, 5])
    heads = kv_heads * dice.randint(1, 3)
    dim = head_dim or dice.choice([8, 16, 40])
    count = dice.randint(1, 3)
    items = dice.choice([1, batch])
    most = batch * count * kv_heads * (longest + 4)
    ranges = torch.zeros(items, kv_heads, count, 2, dtype=dice.choice([torch.int32, torch.int64]))
    total = 0
    for b in range(items):
        at = dice.randint(0, 3)
        for h, r in dice.sample([(h, r) for h in range(kv_heads) for r in range(count)], kv_heads * count):
            length = dice.choice([0, 1, longest, dice.randint(1, longest)])
            ranges[b, h, r] = torch.tensor([at, at + length]) if length else torch.tensor([at + 2, at])
            at += length + dice.choice([0, 0, 3])
        total = max(total, at)
    total = min(total + dice.randint(1, 4), most)
    options: dict[str, Any] = {"ranges": ranges}
    empty = torch.zeros(batch, total, dtype=torch.bool)
    if dice.random() < 0.7:
        rows = dice.choice([1, batch])
        keys = torch.randint(-1 if dice.random() < 0.5 else 0, longest, (rows, total), generator=rng)
        reach = (0, longest) if dice.random() < 0.5 else (longest, longest + 5)  # the second sees nearly everything
        options["key_positions"] = keys.to(dice.choice([torch.int32, torch.int64]))
        options["query_positions"] = torch.randint(*reach, (dice.choice([1, batch]), queries), generator=rng)
        kinds = [None, longest // 2, [dice.randint(0, 2 * longest) for _ in range(dice.choice([kv_heads, heads]))]]
        options["spans"] = dice.choice(kinds)
        options["sink"] = dice.choice([0, 0, 3])
        empty = keys.expand(batch, -1) < 0
    if dice.random() < 0.3:
        options["scale"] = 0.3
    q = torch.randn(batch, queries, heads, dim, generator=rng, dtype=torch.float64).transpose(1, 2)
    q = q if dice.random() < 0.5 else q.contiguous()
    k, v = (torch.randn(batch, total, dim, generator=rng, dtype=torch.float64) for _ in range(2))
    unread = _in_no_range(ranges, batch, total) | empty
    k[unread] = v[unread] = float("nan")
    return Problem(q, k, v, options)


def _in_no_range(ranges: torch.Tensor, batch: int, total: int) -> torch.Tensor:
    unread = torch.ones(batch, total, dtype=torch.bool)
    for b in range(batch):
        for start, end in ranges[b % len(ranges)].reshape(-1, 2).tolist():
            unread[b, start:end] = False
    return unread
