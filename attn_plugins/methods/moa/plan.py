"""A plan of spans: how far each attention head looks back, as a rule of the length (arXiv 2406.14909, section 3).

A head's rule is `alpha + beta * N`, N the prompt and what is to be generated together. What it keeps is whole blocks,
the sinks (the first tokens of a text, which all later ones see) among them:

    cache = ceil_block(max(min(int(alpha + beta * N), N), 2 * block))        ring = cache - sink

and one rule holds for prefill and decoding: query i sees key j iff `j <= i and (j < sink or i - j < ring)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class SpanPlan:
    """A rule for every head of every layer.

    Args:
        alphas, betas: (layers, heads), in tokens and as shares of the length; alphas may be negative.
        per: what a head of the tables is, "kv" (a KV head and all its query heads) or "query".
        query_heads, kv_heads: of a layer. Two equal numbers also fit models that group their query heads, for files
            that tell only one of them.
        sink: first tokens of a text that all later ones see.
        block: caches are multiples of it, in tokens, and at least two of it.
        model: what it was made for, for people.
        provenance: how it was made, for people: plain values.

    Raises:
        ValueError: tables of unequal or wrong shape, numbers that are not finite, heads that do not divide.
    """

    alphas: Table
    betas: Table
    per: Literal["kv", "query"]
    query_heads: int
    kv_heads: int
    sink: int = 64
    block: int = 64
    model: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.per not in ("kv", "query"):
            raise ValueError(f"per={self.per!r}: legal are 'kv' and 'query'")
        for name, least in (("query_heads", 1), ("kv_heads", 1), ("sink", 0), ("block", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: give {least} or more")
        if self.query_heads % self.kv_heads:
            raise ValueError(f"{self.query_heads} query heads are no multiple of {self.kv_heads} KV heads")
        for name in ("alphas", "betas"):
            object.__setattr__(self, name, _table(name, getattr(self, name)))
        shapes = [(len(table), len(table[0])) for table in (self.alphas, self.betas)]
        if shapes[0] != shapes[1] or shapes[0][1] != self.heads:
            raise ValueError(
                f"alphas {shapes[0]}, betas {shapes[1]}: both are (layers, {self.heads} {self.per} heads) of a plan "
                f"for {self.query_heads} query and {self.kv_heads} KV heads"
            )

    @property
    def layers(self) -> int:
        return len(self.alphas)

    @property
    def heads(self) -> int:
        """Heads of the tables."""
        return self.kv_heads if self.per == "kv" else self.query_heads

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.query_heads // self.kv_heads

    def caches(self, n: int) -> torch.Tensor:
        """(layers, heads) int64: tokens that each head of the tables keeps of a text of `n`, sinks included."""
        rows = zip(self.alphas, self.betas, strict=True)
        kept = [[cache_size(*rule, n, self.sink, self.block) for rule in zip(*row, strict=True)] for row in rows]
        return torch.tensor(kept, dtype=torch.int64)

    def spans(self, n: int) -> torch.Tensor:
        """(layers, heads) int64: tokens that each head looks back, itself included, at a length of `n` tokens."""
        return self.caches(n) - self.sink

    def cache_lengths(self, n: int) -> torch.Tensor:
        """(layers, kv_heads) int64: tokens that each KV head keeps, sinks included: the most that its group needs."""
        return self.caches(n).view(self.layers, self.kv_heads, -1).amax(-1)

    def density(self, n: int) -> float:
        """Mean share of a text of `n` tokens that a head of the tables keeps: 1 is dense."""
        return float((self.caches(n).clamp(max=n).double() / n).mean())

    def memory(self, n: int) -> float:
        """Share of a dense cache's bytes at `n` tokens; above `density` where the heads of a KV group differ."""
        return float(self.cache_lengths(n).double().mean() / n)

    def search_density(self, n: int) -> float:
        """The published search's density, in whole blocks of the text and without rounding up (section 4)."""
        alphas, betas = (torch.tensor(table, dtype=torch.float64) for table in (self.alphas, self.betas))
        blocks = max(n // self.block, 1)
        band = (alphas.div(self.block, rounding_mode="floor") + betas * blocks).trunc().clamp(min=1)
        return float(((band + 1).clamp(max=blocks) / blocks).mean())

    def pair_fraction(self, n: int) -> float:
        """Share of a prefill's causal (query, key) pairs that are computed, mean over the heads.

        About `2 c - c ** 2` of a head that keeps a share `c`: half of the cache is three quarters of the pairs.
        """
        kept = self.caches(n).clamp(max=n).double()
        return float((kept * (2 * n + 1 - kept) / (n * (n + 1.0))).mean())

    def matches(self, config: Any) -> bool:
        """Whether the plan is for models of this shape: a transformers config, or (layers, query heads, KV heads)."""
        layers, query_heads, kv_heads = shape_of(config)
        own = (self.layers, self.heads)
        if self.query_heads == self.kv_heads:
            return own == (layers, kv_heads if self.per == "kv" else query_heads)
        return (*own, self.query_heads, self.kv_heads) == (layers, self.heads, query_heads, kv_heads)

    def fitted(self, config: Any) -> SpanPlan:
        """The plan with the model's own numbers of heads.

        Raises:
            ValueError: a plan for another shape; the message names both.
        """
        layers, query_heads, kv_heads = shape_of(config)
        if not self.matches(config):
            told = f"{self.query_heads} query and {self.kv_heads} KV heads"
            if self.query_heads == self.kv_heads:
                told = f"{self.heads} {'KV' if self.per == 'kv' else 'query'} heads"
            raise ValueError(
                f"the plan is for {self.layers} layers of {told}{f' ({self.model})' if self.model else ''}; the model "
                f"has {layers} layers of {query_heads} query and {kv_heads} KV heads"
            )
        return replace(self, query_heads=query_heads, kv_heads=kv_heads)

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, which `load_plan` reads. The file's name is the caller's; folders must exist."""
        from attn_plugins.methods.moa.files import write

        return write(self, path)


def cache_size(alpha: float, beta: float, n: int, sink: int, block: int) -> int:
    """Tokens that a head of this rule keeps of a text of `n`, sinks included: the formula above.

    Raises:
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"n={n}: a length is 1 or more tokens")
    least = max(2 * block, sink + block)  # of rings behind more sinks than a block, a block too
    kept = max(min(int(alpha + beta * n), n), least)
    return -(-kept // block) * block


def shape_of(config: Any) -> tuple[int, int, int]:
    """(layers, query heads, KV heads) of a transformers config, or of a tuple of these numbers."""
    if isinstance(config, (tuple, list)):
        layers, query_heads, kv_heads = config
        return int(layers), int(query_heads), int(kv_heads)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    heads = config.num_attention_heads
    return config.num_hidden_layers, heads, getattr(config, "num_key_value_heads", None) or heads


def _table(name: str, rows: Any) -> Table:
    try:
        table = tuple(tuple(_number(value) for value in row) for row in rows)
    except TypeError:
        raise ValueError(f"{name}: give a row of numbers for each layer") from None
    if not table or not table[0] or any(len(row) != len(table[0]) for row in table):
        raise ValueError(f"{name} has rows of {sorted({len(row) for row in table})} heads: give each layer as many")
    if not all(math.isfinite(value) for row in table for value in row):
        raise ValueError(f"{name} holds numbers that are not finite")
    return table


def _number(value: Any) -> float:
    """An int stays an int, so that a file says what it said."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        value = float(value)
    return value
