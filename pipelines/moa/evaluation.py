"""Plans of equal memory on text that nobody has seen: perplexity by position, and retrieval by length and depth.

Calibration, validation and test are three texts, and every row is drawn from a seed that names its purpose. One call
judges one search; several searches, of several seeds, go into one report (`moa/report.py`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attn_plugins.pipelines.moa.baselines import PlanAt
from attn_plugins.pipelines.moa.calibration import Texts, tasks_for
from attn_plugins.pipelines.moa.profile import Tick, silent
from attn_plugins.pipelines.moa.running import spans_in_place
from attn_plugins.training.small_llama.evaluation import retrieval_accuracy, text_losses

FILE = "evaluation.json"
SEEDS = 3  # windows of the test text are dealt out to as many seeds in turn


@dataclass(frozen=True)
class EvaluationSettings:
    """
    Args:
        window: of running text, tokens; windows: how many for each seed.
        lengths: of prompts, tokens; depths: of the record, 0 the far end (where it would stand among the sinks, which
            every plan keeps); trials: prompts for each of both.

    Raises:
        ValueError: no windows or trials.
    """

    window: int = 4096
    windows: int = 12
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    trials: int = 8

    def __post_init__(self) -> None:
        if self.windows < 1 or self.trials < 1 or not self.lengths or not self.depths:
            raise ValueError(f"{self}: give 1 or more of windows, lengths, depths and trials")


@dataclass
class Judged:
    """What one seed found. `losses`: {name: windows x `window` nats}; `found`: {name: {length: {depth: prompts}}}.

    `memory`: {name: {length: share of a dense cache}}, rounding included.
    """

    seed: int
    settings: EvaluationSettings
    losses: dict[str, list[list[float]]] = field(default_factory=dict)
    found: dict[str, dict[int, dict[float, int]]] = field(default_factory=dict)
    memory: dict[str, dict[int, float]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self.losses)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Judged:
        data = json.loads(path.read_text(encoding="utf-8"))
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["settings"].items()}
        found = {
            name: {int(n): {float(depth): hits for depth, hits in row.items()} for n, row in table.items()}
            for name, table in data["found"].items()
        }
        memory = {name: {int(n): share for n, share in row.items()} for name, row in data["memory"].items()}
        return cls(data["seed"], EvaluationSettings(**settings), data["losses"], found, memory)


def judge(
    model: Any,
    tokenizer: Any,
    texts: Texts,
    plans: Mapping[str, PlanAt],
    seed: int,
    settings: EvaluationSettings | None = None,
    *,
    path: Path | None = None,
    tick: Tick = silent,
) -> Judged:
    """Run every plan on the same windows and prompts of `texts.test`.

    Args:
        plans: by name, of `moa_baselines.contenders`.
        seed: which windows (0, 1, 2 share none), and which prompts.
        path: of a file that is written after each plan; what it holds already, of the same seed and settings, is kept.
        tick: called with what was done and its tokens.

    Raises:
        ValueError: a test text that is too short for the windows, a file of other settings.
    """
    settings = settings or EvaluationSettings()
    found = Judged.load(path) if path is not None and path.exists() else Judged(seed, settings)
    if (found.seed, found.settings) != (seed, settings):
        raise ValueError(f"{path} is of seed {found.seed} and {found.settings}: give another folder, or delete it")
    windows = _windows(texts.test, settings, seed)
    tasks = tasks_for(tokenizer, texts.test)
    for name, plan_at in plans.items():
        if name in found.losses:
            tick(name, work(settings))
            continue
        losses = []
        with spans_in_place(model, plan_at(settings.window)):
            for window in windows:
                losses.append(text_losses(model, window, settings.window, 1, tasks.start)[0])
                tick(f"{name}: text", settings.window)
        hits: dict[int, dict[float, int]] = {}
        for length in settings.lengths:
            with spans_in_place(model, plan_at(length)):
                for depth in settings.depths:
                    share = retrieval_accuracy(model, tasks, length, depth, settings.trials, seed=seed)
                    hits.setdefault(length, {})[depth] = round(share * settings.trials)
                    tick(f"{name}: retrieval at {length}", length * settings.trials)
        found.found[name] = hits
        found.memory[name] = {n: _memory(plan_at, n) for n in sorted({*settings.lengths, settings.window})}
        found.losses[name] = [[round(value, 5) for value in row.tolist()] for row in losses]
        if path is not None:
            found.save(path)
    return found


def work(settings: EvaluationSettings) -> int:
    """Tokens that one plan reads."""
    return settings.windows * settings.window + len(settings.depths) * settings.trials * sum(settings.lengths)


def _windows(text: list[int], settings: EvaluationSettings, seed: int) -> list[list[int]]:
    """Disjoint windows, every third one of those that fit spread over the text."""
    count, size = SEEDS * settings.windows, settings.window
    if len(text) < count * size:
        raise ValueError(
            f"{len(text):,} tokens of test text: {count} windows of {size:,} are needed, {SEEDS} seeds' worth"
        )
    starts = [number * (len(text) - size) // (count - 1) for number in range(count)]
    return [text[start : start + size] for start in starts[seed % SEEDS :: SEEDS]]


def _memory(plan_at: PlanAt, n: int) -> float:
    plan = plan_at(n)
    return 1.0 if plan is None else min(plan.memory(n), 1.0)


def losses_of(judged: Judged, name: str) -> torch.Tensor:
    """(windows, tokens) float64."""
    return torch.tensor(judged.losses[name], dtype=torch.float64)
