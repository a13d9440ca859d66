"""A causal language model, dense against patched: what it predicts on held-out text, and how fast it reads and writes.

Each row of text is read dense, by each method, and dense again, in turn; the second dense reading is the noise floor.
Speed is of `generate`, in rounds of its own (language_speed.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins import record
from attn_plugins.metrics import kl_divergence, top1_agreement
from attn_plugins.metrics.divergence import CHUNK
from attn_plugins.pipelines.comparing import progress as bars
from attn_plugins.pipelines.comparing.asked import Asked
from attn_plugins.pipelines.comparing.clocks import machine
from attn_plugins.pipelines.comparing.lanes import density, summary
from attn_plugins.pipelines.comparing.language_comparison import LanguageComparison, Predictions
from attn_plugins.pipelines.comparing.language_speed import Speed, calls, speeds
from attn_plugins.runtime import device_of
from attn_plugins.targets import find


@dataclass(frozen=True)
class Reading:
    """How much is read and written.

    Args:
        window: tokens of a row. rows: how many, spread evenly over the text.
        prompt: tokens of the prompt that speed is measured behind; None: as the window.
        tokens: to generate then; 0: no speed is measured. rounds: of that, after one to warm up.
        start: the token that stands before each row.

    Raises:
        ValueError: no rows, a window or prompt below 2 tokens, or 1 token to generate.
    """

    window: int = 2048
    rows: int = 16
    prompt: int | None = None
    tokens: int = 32
    rounds: int = 3
    start: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.rounds < 1:
            raise ValueError(f"rows={self.rows}, rounds={self.rounds}: give 1 or more of both")
        if self.window < 2 or (self.prompt is not None and self.prompt < 2):
            raise ValueError(f"window={self.window}, prompt={self.prompt}: give 2 or more tokens")
        if self.tokens < 0 or self.tokens == 1:
            raise ValueError(f"tokens={self.tokens}: give 2 or more to generate, or 0 to measure no speed")


def compare_language(
    model: Any, asked: Sequence[Asked], text: Sequence[int], reading: Reading | None = None, *, progress: bool = False,
) -> list[LanguageComparison]:  # fmt: skip
    """Several methods beside each other, all against the same dense model. The model is left as it was.

    Args:
        model: a causal language model of transformers that is not patched.
        asked: the methods with their settings.
        text: ids of held-out text, at least a window of them; rows do not overlap, so there may be fewer of them.
        progress: show a bar.

    Raises:
        ValueError: a text below one window, a window beyond the model's positions, a patched model, no methods.
    """
    reading = reading or Reading()
    windows = rows_of(text, reading)
    _check(model, asked, reading)
    prompt = torch.tensor([_prompt(text, reading)], device=device_of(model))
    lanes = [_Lane(one) for one in asked]
    total = len(windows) * (len(lanes) + 2) + calls(len(lanes), reading.tokens, reading.rounds)
    with bars.bar(progress, total) as tick:
        dense: list[torch.Tensor] = []
        again = _Lane(Asked("dense again"))
        for window in windows:
            ids = torch.tensor([reading.start, *window], device=device_of(model))
            logits = _logits(model, ids)
            dense.append(token_losses(logits, ids[1:]))
            tick("text: dense")
            for lane in lanes:
                with lane.asked.patched(model) as handle:
                    lane.read(_logits(model, ids), logits, ids[1:])
                    lane.name, lane.summary, lane.density = lane.asked.name(handle), summary(handle), density(handle)
                tick(f"text: {lane.name}")
            again.read(_logits(model, ids), logits, ids[1:])
            tick("text: dense again")
            del logits
        speed: list[Speed | None] = [None] * len(lanes)
        if reading.tokens:
            speed = list(speeds(model, [lane.asked for lane in lanes], prompt, reading.tokens, reading.rounds, tick))
    losses = torch.stack(dense)
    return [
        LanguageComparison(
            type(model).__name__, lane.name, lane.summary, reading.window, lane.density, losses,
            lane.predictions(), again.predictions(), one, machine(device_of(model)), prompt.shape[1], reading.tokens,
        )
        for lane, one in zip(lanes, speed, strict=True)
    ]  # fmt: skip


class _Lane:
    """What one way to run the model predicted, row by row."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.name = self.summary = asked.label
        self.density: float | None = None
        self.rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def read(self, logits: torch.Tensor, dense: torch.Tensor, targets: torch.Tensor) -> None:
        self.rows.append(
            (token_losses(logits, targets), kl_divergence(dense, logits), top1_agreement(dense, logits)),
        )

    def predictions(self) -> Predictions:
        return Predictions(*(torch.stack(parts) for parts in zip(*self.rows, strict=True)))


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each prediction in nats: logits (N, vocabulary), targets (N,) -> (N,) float64 on the CPU."""
    found = [
        torch.nn.functional.cross_entropy(part.double(), wanted, reduction="none").cpu()
        for part, wanted in zip(logits.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat(found)


def rows_of(text: Sequence[int], reading: Reading) -> list[list[int]]:
    """As many windows as fit without overlap, at most `reading.rows`, spread evenly.

    Raises:
        ValueError: a text below one window.
    """
    size, count = reading.window, min(reading.rows, len(text) // reading.window)
    if not count:
        raise ValueError(
            f"the text has {len(text):,} tokens, and a window {size:,}: give more text, or a window of fewer tokens"
        )
    starts = [number * (len(text) - size) // max(count - 1, 1) for number in range(count)]
    return [list(text[start : start + size]) for start in starts]


def _prompt(text: Sequence[int], reading: Reading) -> list[int]:
    size = reading.prompt or reading.window
    if len(text) < size:
        raise ValueError(f"the text has {len(text):,} tokens, and the prompt {size:,}: give more text or a shorter one")
    return [reading.start, *text[: size - 1]]


@torch.inference_mode()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids[None, :-1], use_cache=False).logits[0]


def _check(model: Any, asked: Sequence[Asked], reading: Reading) -> None:
    if not asked:
        raise ValueError("nothing to compare with dense attention: give one or more methods")
    if any(record.patches_of(target.root) for target in find(model)):
        raise ValueError(f"this {type(model).__name__} is patched already: attn_plugins.unpatch(model) first")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(reading.window, (reading.prompt or reading.window) + reading.tokens)
    if most is not None and longest > most:
        raise ValueError(
            f"{longest:,} tokens (the window, or the prompt and what is generated): this model has positions for "
            f"{most:,}; give a shorter window or prompt"
        )
