"""How fast a language model reads and writes, dense and patched, what its cache takes, and attention's share in both.

What is timed is `generate`, token by token: up to the first is the prefill, the others are decoding. All ways take
turns. Attention's share comes from calls of its own, because a clock around each layer costs time.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from attn_plugins.handle import PatchHandle
from attn_plugins.pipelines.comparing.asked import Asked
from attn_plugins.pipelines.comparing.clocks import Sites, bound, spread
from attn_plugins.pipelines.comparing.progress import Tick
from attn_plugins.pipelines.stopwatch import Stopwatch, attach, now


@dataclass(frozen=True)
class Pace:
    """Seconds, medians. `prefill`: up to the first token. `token`: each one after it. `cache`: bytes kept at the end.

    `attention`: (prefill, a token), at the patched sites, and `clocked`: all of it in the same calls. `spread`: of the
    prefill, the 20 % and 80 % quantiles.
    """

    prefill: float
    token: float
    cache: int
    attention: tuple[float, float]
    clocked: tuple[float, float]
    spread: tuple[float, float]

    def share(self, which: int) -> float:
        """Attention's share: 0 of prefill, 1 of decoding."""
        return min(max(self.attention[which] / self.clocked[which], 0.0), 1.0)


@dataclass(frozen=True)
class Speed:
    """Dense against patched. Bounds: what a method could gain at most, with attention that costs nothing (Amdahl)."""

    dense: Pace
    patched: Pace

    @property
    def prefill_bound(self) -> float:
        return bound(self.dense.share(0))

    @property
    def decode_bound(self) -> float:
        return bound(self.dense.share(1))


def calls(methods: int, tokens: int, rounds: int) -> int:
    """How many ticks `speeds` gives, where all methods have the same sites."""
    return (methods + 1) * (2 * rounds + 1) if tokens else 0


def speeds(
    model: Any, asked: Sequence[Asked], prompt: torch.Tensor, tokens: int, rounds: int, tick: Tick
) -> Iterator[Speed]:
    """One for each method. prompt: (1, n) ids. tokens: to generate, 2 or more."""
    ways: list[Asked | None] = [None, *asked]
    taken: list[list[Written]] = [[] for _ in ways]
    for turn in range(rounds + 1):
        for number, way in enumerate(ways):
            with contextlib.nullcontext() if way is None else way.patched(model):
                one = generate(model, prompt, tokens)
            if turn:  # the first round warms up
                taken[number].append(one)
            tick(f"speed: {'dense' if way is None else way.label}")
    dense: dict[Sites, list[Written]] = {}
    for way, own in zip(asked, taken[1:], strict=True):
        with way.patched(model) as handle:
            sites = Sites.of(handle)
            inside = _clocked(model, handle, prompt, tokens, rounds, tick)
        if sites not in dense:
            with sites.dense(model) as handle:
                dense[sites] = _clocked(model, handle, prompt, tokens, rounds, tick)
        yield Speed(_pace(taken[0], dense[sites]), _pace(own, inside))


def _clocked(
    model: Any, handle: PatchHandle, prompt: torch.Tensor, tokens: int, rounds: int, tick: Tick
) -> list[Written]:
    watch, found = Stopwatch(), []
    attach(watch, handle)
    for _ in range(rounds):
        found.append(generate(model, prompt, tokens, watch))
        tick("attention")
    return found


def _pace(taken: list[Written], clocked: list[Written]) -> Pace:
    return Pace(
        *_medians([one.seconds for one in taken]), taken[-1].cache,
        _medians([one.attention for one in clocked]), _medians([one.seconds for one in clocked]),
        spread([one.seconds[0] for one in taken]),
    )  # fmt: skip


def _medians(rows: list[list[float]]) -> tuple[float, float]:
    """(of the first of each row, of all others)."""
    return statistics.median(row[0] for row in rows), statistics.median(value for row in rows for value in row[1:])


@dataclass(frozen=True)
class Written:
    """One generation, token by token: `seconds` up to each, and `attention` within them. `cache`: bytes at the end."""

    seconds: list[float]
    attention: list[float]
    cache: int


@torch.inference_mode()
def generate(model: Any, prompt: torch.Tensor, tokens: int, watch: Stopwatch | None = None) -> Written:
    """Generate exactly `tokens` tokens, greedily. Its clock is read where `generate` asks whether to stop."""
    from transformers import StoppingCriteriaList

    moments, laps = [now(prompt.device)], []

    def after_token(ids: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
        moments.append(now(prompt.device))
        laps.append(0.0 if watch is None else watch.lap())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        pad_token_id=0, return_dict_in_generate=True, temperature=None, top_p=None, top_k=None,
        stopping_criteria=StoppingCriteriaList([after_token]),
    )  # fmt: skip
    seconds = [end - begin for begin, end in pairwise(moments)]
    return Written(seconds, laps, cache_bytes(out.past_key_values))


def cache_bytes(cache: Any) -> int:
    """Of all keys and values that a transformers cache holds; 0 where there is none."""
    return sum(_kept(layer) for layer in getattr(cache, "layers", ()))


def _kept(layer: Any) -> int:
    known = getattr(layer, "nbytes", None)
    if isinstance(known, int):  # a ring's, which are packed
        return known
    pair = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(kept.numel() * kept.element_size() for kept in pair if isinstance(kept, torch.Tensor))
