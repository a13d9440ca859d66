"""What a search chooses from: the rules, and what each would lose and keep for every group of heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from attn_plugins.methods.moa import SpanPlan
from attn_plugins.pipelines.moa.profile import Profile
from attn_plugins.search import Choice, Problem, Rule, grouped, hidden_loss, rule_grid

Per = Literal["layer", "kv", "query"]


@dataclass(frozen=True)
class SearchSettings:
    """
    Args:
        density: of a dense cache, the most that may be kept, at every length.
        lengths: tokens at which influence is profiled and the loss counts.
        validate_at: a length that is not profiled; None is between the two longest.
        reach: the longest length that the plan is meant for, where the budget holds too; None is the longest profiled.
        rows, validation_rows: calibration rows of each length, and rows of each kind that choose among the plans.
        points: bounds an objective on the epsilon-constraint grid.
        influence: "windows", exact for what a window hides at once, or "pairs", the paper's sum over pairs.
        step, parts: of the grid of rules: alpha in steps of `step` tokens (None: half of the shortest length), beta in
            `parts` parts.
        sink, block: of the plan, in tokens.
        solver: "auto", "milp" or "lp", as for `search.choose`.
        seed: of the calibration rows and of the validation rows.

    Raises:
        ValueError: a density outside of 0..1, no lengths, lengths that are not whole blocks, a sink that is not.
    """

    density: float = 0.5
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    validate_at: int | None = None
    reach: int | None = None
    rows: int = 12
    validation_rows: int = 4
    points: int = 5
    influence: str = "windows"
    step: int | None = None
    parts: int = 8
    sink: int = 64
    block: int = 64
    solver: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density}: give a share of the dense cache, above 0 and up to 1")
        if not self.lengths or min(self.lengths) < 2 * self.block:
            raise ValueError(f"lengths={self.lengths}: give one or more, of at least two blocks of {self.block} tokens")
        odd = [n for n in (*self.lengths, self.sink) if n % self.block]
        if odd:
            raise ValueError(f"{odd}: lengths and sinks are whole blocks of {self.block} tokens")
        for name in ("rows", "validation_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")

    @property
    def unseen(self) -> int:
        """The length of validation, in whole blocks."""
        if self.validate_at is not None:
            return self.validate_at
        longest, second = self.lengths[-1], self.lengths[-2] if len(self.lengths) > 1 else self.lengths[-1] // 2
        return (longest + second) // 2 // self.block * self.block

    @property
    def bounded(self) -> tuple[int, ...]:
        """Lengths at which the budget holds."""
        return tuple(sorted({*self.lengths, self.unseen, self.reach or self.lengths[-1]}))


@dataclass(frozen=True)
class Options:
    """The rules, and the problem over (objectives: profile lengths; budgets: `bounded` lengths; items; rules).

    Items are layers, KV heads or query heads, layer by layer.
    """

    rules: tuple[Rule, ...]
    problem: Problem
    per: Per
    shape: tuple[int, int, int]
    settings: SearchSettings

    @classmethod
    def of(
        cls, profile: Profile, settings: SearchSettings, shape: tuple[int, int, int], per: Per = "kv",
        rules: Sequence[Rule] | None = None,
    ) -> Options:  # fmt: skip
        """shape: (layers, query heads, KV heads). rules: None is the settings' grid.

        Raises:
            ValueError: a budget below what the smallest rules keep.
        """
        shortest, longest = settings.lengths[0], settings.lengths[-1]
        if rules is None:
            rules = rule_grid(shortest, longest, step=settings.step, parts=settings.parts)
        # one layer whose heads have all the rules: what a rule keeps is the plan's to say
        alphas, betas = (tuple(rule[part] for rule in rules) for part in (0, 1))
        every = SpanPlan((alphas,), (betas,), "kv", len(rules), len(rules), settings.sink, settings.block)
        kept = {n: every.cache_lengths(n)[0] for n in settings.bounded}
        items = {"layer": shape[0], "kv": shape[0] * shape[2], "query": shape[0] * shape[1]}[per]
        losses = []
        for length in settings.lengths:
            spans = (kept[length] - settings.sink) // settings.block
            each = hidden_loss(profile.maps(length), spans, sink=settings.sink // settings.block)
            losses.append(grouped(each.flatten(0, 1), items, dim=0).numpy())
        costs = [
            np.broadcast_to((kept[n].clamp(max=n).double() / n).numpy(), (items, len(rules))) for n in settings.bounded
        ]
        budgets = np.full(len(costs), settings.density)
        return cls(tuple(rules), Problem(np.stack(losses), np.stack(costs), budgets), per, shape, settings)

    def plan(self, choice: Choice, model: str = "", **provenance: object) -> SpanPlan:
        """The choice as a plan."""
        layers, query_heads, kv_heads = self.shape
        rules = [self.rules[option] for option in choice.options]
        each = len(rules) // layers
        repeats = kv_heads if self.per == "layer" else 1  # a layer's rule is that of all its KV heads
        rows = [[rule for rule in rules[at : at + each] for _ in range(repeats)] for at in range(0, len(rules), each)]
        alphas, betas = (tuple(tuple(rule[part] for rule in row) for row in rows) for part in (0, 1))
        per: Literal["kv", "query"] = "query" if self.per == "query" else "kv"
        settings = self.settings
        return SpanPlan(
            alphas, betas, per, query_heads, kv_heads, settings.sink, settings.block, model, dict(provenance)
        )
