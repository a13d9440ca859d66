"""What a comparison of language models found, and how it is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from attn_plugins.metrics import Interval, mean_interval, quantile
from attn_plugins.pipelines.comparing.clocks import NOTHING, scatter
from attn_plugins.pipelines.comparing.language_speed import Speed
from attn_plugins.pipelines.comparing.overview import (
    Figures,
    cell,
    columns_of,
    milliseconds,
    overview,
    percent,
    power,
    quantiles_of_kl,
    size,
    with_ends,
)  # fmt: skip

EDGES = (0, 16, 64, *(128 * 2**power for power in range(14)))


@dataclass(frozen=True)
class Predictions:
    """(rows, window) each. `losses`: nats. `kl`: KL(dense || this), nats. `agree`: the first choice is dense's."""

    losses: torch.Tensor
    kl: torch.Tensor
    agree: torch.Tensor


@dataclass(frozen=True)
class LanguageComparison:
    """Dense against patched on the same rows of text.

    `dense`: (rows, window) losses in nats; `patched`, `noise`: predictions of the method, and of dense again. `speed`:
    None if it was not asked for. Intervals are of 95 %, from the spread between rows.
    """

    model: str
    method: str
    summary: str
    window: int
    density: float | None
    dense: torch.Tensor = field(repr=False)
    patched: Predictions = field(repr=False)
    noise: Predictions = field(repr=False)
    speed: Speed | None
    machine: str
    prompt: int
    tokens: int
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.dense)

    @property
    def perplexity(self) -> Interval:
        return _by_rows(self.patched.losses).through(math.exp)

    @property
    def dense_perplexity(self) -> Interval:
        return _by_rows(self.dense).through(math.exp)

    @property
    def ratio(self) -> Interval:
        """Perplexity over dense, row by row: what the rows have in common is not in its interval."""
        return _by_rows(self.patched.losses - self.dense).through(math.exp)

    def figures(self) -> Figures:
        """The patched model's numbers by name (overview.py)."""
        found: Figures = {"density": self.density, **_quality(self.patched, self.dense)}
        if self.speed is not None:
            dense, own = self.speed.dense, self.speed.patched
            found |= {
                "prefill_seconds": own.prefill, "prefill_speedup": dense.prefill / own.prefill,
                "prefill_bound": self.speed.prefill_bound, "attention_seconds": own.attention[0],
                "attention_speedup": dense.attention[0] / own.attention[0] if own.attention[0] else None,
                "attention_share": own.share(0), "decode_seconds": own.token, "decode_speedup": dense.token / own.token,
                "decode_bound": self.speed.decode_bound, "cache_bytes": float(own.cache),
            }  # fmt: skip
        return found

    def floor(self) -> Figures:
        """The same of dense: its times, and how far it is from itself, run again."""
        found: Figures = {"density": 1.0, **_quality(self.noise, self.dense)}
        if self.speed is not None:
            dense = self.speed.dense
            found |= {
                "prefill_seconds": dense.prefill, "attention_seconds": dense.attention[0],
                "attention_share": dense.share(0), "decode_seconds": dense.token, "cache_bytes": float(dense.cache),
            }  # fmt: skip
        return found

    def sentences(self) -> tuple[str, str, str]:
        """Speed, cost and bound, one sentence each."""
        speed, limit = "Speed was not measured.", "Attention's share was not measured, so its bound is not known."
        if self.speed is not None:
            dense, own = self.speed.dense, self.speed.patched
            speed = (
                f"Reading {self.prompt:,} tokens takes {milliseconds(own.prefill)} where dense takes "
                f"{milliseconds(dense.prefill)}, {dense.prefill / own.prefill:.2f}x; each new token "
                f"{milliseconds(own.token)} for {milliseconds(dense.token)}, {dense.token / own.token:.2f}x, with "
                f"{size(own.cache)} of cache for {size(dense.cache)}; reading, {scatter(dense.spread)}."
            )
            limit = (
                f"Attention is {dense.share(0):.1%} of dense reading and {dense.share(1):.1%} of dense writing, so no "
                f"method could gain more than {self.speed.prefill_bound:.2f}x and {self.speed.decode_bound:.2f}x "
                "(Amdahl)."
            )
            limit = limit if any(dense.attention) else NOTHING
        figures = self.figures()
        column = {one.name: cell(one, figures) for one in columns_of([figures])}
        cost = (
            f"Perplexity is {column['perplexity_ratio']} of dense's ({self.dense_perplexity.mean:.4g}); KL(dense || "
            f"patched) is {column['kl']} nats a token, and {column['top1']} of the first choices are dense's "
            f"(dense against itself: {power(float(self.noise.kl.mean()))} nats, {percent(_share(self.noise.agree))})."
        )
        return speed, cost, limit

    def by_position(self) -> list[tuple[str, ...]]:
        """Cells of a table, header first: the same by how many tokens stand before."""
        lines: list[tuple[str, ...]] = [
            ("tokens before", "perplexity, dense", "patched", "over dense", "KL", "KL, 99 %", "top-1")
        ]
        for first, last in self.stretches():
            at = slice(first, last)
            dense, own = (float(losses[:, at].mean()) for losses in (self.dense, self.patched.losses))
            kl = self.patched.kl[:, at]
            lines.append(
                (
                    f"{first:,} to {last - 1:,}", f"{math.exp(dense):.4g}", f"{math.exp(own):.4g}",
                    f"{math.exp(own - dense):.4f}", power(float(kl.mean())), power(quantile(kl, 0.99)),
                    f"{_share(self.patched.agree[:, at]):.2%}",
                )
            )  # fmt: skip
        return lines

    def stretches(self) -> list[tuple[int, int]]:
        """(first, behind the last) of the positions that tables and plots go by."""
        inside = [edge for edge in EDGES if edge < self.window]
        return list(zip(inside, [*inside[1:], self.window], strict=True))

    def render(self) -> str:
        """Tables in plain text."""
        from attn_plugins.report import table

        title = (
            f"{self.method} on {self.model}: {self.rows} rows of {self.window:,} tokens (95 % intervals by row); "
            f"{self.machine}"
        )
        both = overview({"dense": self.floor(), self.method: self.figures()})
        return "\n".join([title, "", self.summary, "", *table(both), "", *table(self.by_position())])

    def __str__(self) -> str:
        return self.render()


def _by_rows(values: torch.Tensor) -> Interval:
    return mean_interval(values.double().mean(dim=1).tolist())


def _share(agree: torch.Tensor) -> float:
    return float(agree.double().mean())


def _quality(own: Predictions, dense: torch.Tensor) -> Figures:
    found: Figures = {}
    intervals: Sequence[tuple[str, Interval]] = (
        ("perplexity", _by_rows(own.losses).through(math.exp)),
        ("perplexity_ratio", _by_rows(own.losses - dense).through(math.exp)),
        ("kl", _by_rows(own.kl).within(0.0, math.inf)),
        ("top1", _by_rows(own.agree).within(0.0, 1.0)),
    )
    for name, interval in intervals:
        found |= {name: interval.mean, **with_ends(name, interval)}
    return found | quantiles_of_kl(own.kl)
