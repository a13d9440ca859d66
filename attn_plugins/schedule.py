"""Which steps of a diffusion schedule stay dense.

Published settings keep the first steps dense (arXiv 2504.16922, table 4: 9 of 28 for FLUX, 15 of 50 for HunyuanVideo):
they lay out the picture. Agents stand in those first steps instead, and the last stay dense (arXiv 2312.08874: 30 of
50). Dense steps are a fraction of the schedule, so that they survive another number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

Steps = float | int


@dataclass(frozen=True)
class Schedule:
    """`dense_steps`: a float in 0..1 is a fraction of the schedule, an int a number of steps. It is of the first steps;
    a pair is of the first and of the last.

    `num_steps` is needed only where nothing else tells how long the schedule is (a bare model with a fraction, or with
    dense steps at its end).

    Raises:
        ValueError: a fraction outside 0..1, a negative count, or more than two of them.
    """

    dense_steps: Steps | tuple[Steps, Steps] = 0
    num_steps: int | None = None

    def __post_init__(self) -> None:
        value = self.dense_steps
        pair = tuple(value) if isinstance(value, (list, tuple)) else (value, 0)
        if len(pair) != 2 or not all(_legal(steps) for steps in pair):
            raise ValueError(
                f"dense_steps={value!r}: give a fraction of the schedule as a float in 0..1 (0.3), "
                "or a number of steps as an int (15); or a pair of them, of the first and of the last steps"
            )
        object.__setattr__(self, "dense_steps", pair if pair[1] else pair[0])
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps}: a schedule has at least 1 step")

    @property
    def first(self) -> Steps:
        """The dense steps at the start."""
        return self.dense_steps[0] if isinstance(self.dense_steps, tuple) else self.dense_steps

    @property
    def last(self) -> Steps:
        """The dense steps at the end."""
        return self.dense_steps[1] if isinstance(self.dense_steps, tuple) else 0

    @property
    def always_sparse(self) -> bool:
        return not self.first and not self.last

    @property
    def dense_share(self) -> float | None:
        """The share of the steps that stays dense; None for a number of steps of an unknown length."""
        shares = []
        for steps in (self.first, self.last):
            if isinstance(steps, int) and steps and self.num_steps is None:
                return None
            shares.append(steps if isinstance(steps, float) else steps / (self.num_steps or 1))
        return min(sum(shares), 1.0)

    def first_sparse_step(self, total: int | None) -> int:
        """The number of dense steps at the start of a schedule of `total` steps (rounded to the nearest).

        Raises:
            ValueError: a fraction, with neither `total` nor `num_steps` known.
        """
        return self.first if isinstance(self.first, int) else round(self.first * self._length(total))

    def sparse_steps(self, total: int | None) -> range:
        """The steps of a schedule of `total` that do not stay dense.

        Raises:
            ValueError: neither `total` nor `num_steps` is known.
        """
        length = self._length(total)
        last = self.last if isinstance(self.last, int) else round(self.last * length)
        return range(self.first_sparse_step(total), max(length - last, 0))

    def is_dense(self, step: int, total: int | None) -> bool:
        """Whether step `step` (from 0) of `total` stays dense."""
        if not self.last:
            return bool(self.first) and step < self.first_sparse_step(total)
        return step not in self.sparse_steps(total)

    def _length(self, total: int | None) -> int:
        length = total or self.num_steps
        if length is None:
            raise ValueError(
                f"dense_steps={self.dense_steps} is a share or the end of a schedule whose length is unknown on a bare "
                "model: patch the pipeline, or give num_steps=..., or a whole number of first steps as dense_steps"
            )
        return length


def describe(schedule: Schedule) -> str:
    """The dense steps in words: "the first 30% and the last 5 steps"."""
    rows = (("first", schedule.first), ("last", schedule.last))
    parts = [f"the {end} {_share(steps)}" for end, steps in rows if steps]
    return " and ".join(parts)


def _share(steps: Steps) -> str:
    return f"{steps:.0%} of the steps" if isinstance(steps, float) else f"{steps} steps"


def _legal(steps: Steps) -> bool:
    if isinstance(steps, bool) or not isinstance(steps, (int, float)):
        return False
    return steps >= 0 and (isinstance(steps, int) or steps <= 1)
