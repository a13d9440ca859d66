"""Which steps of a diffusion schedule stay dense.

Published settings keep the first steps dense (arXiv 2504.16922, table 4: 9 of 28 for FLUX, 15 of 50 for HunyuanVideo):
they lay out the picture. Dense steps are a fraction of the schedule, so that they survive another number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """`dense_steps`: a float in 0..1 is a fraction of the schedule, an int a number of steps.

    `num_steps` is needed only where nothing else tells how long the schedule is (a bare model with a fraction).

    Raises:
        ValueError: a fraction outside 0..1 or a negative count.
    """

    dense_steps: float | int = 0
    num_steps: int | None = None

    def __post_init__(self) -> None:
        value = self.dense_steps
        if isinstance(value, bool) or value < 0 or (isinstance(value, float) and value > 1):
            raise ValueError(
                f"dense_steps={value!r}: give a fraction of the schedule as a float in 0..1 (0.3), "
                "or a number of steps as an int (15)"
            )
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps}: a schedule has at least 1 step")

    @property
    def always_sparse(self) -> bool:
        return self.dense_steps == 0

    def first_sparse_step(self, total: int | None) -> int:
        """The number of dense steps at the start of a schedule of `total` steps (rounded to the nearest).

        Raises:
            ValueError: a fraction, with neither `total` nor `num_steps` known.
        """
        if isinstance(self.dense_steps, int):
            return self.dense_steps
        total = total or self.num_steps
        if total is None:
            raise ValueError(
                f"dense_steps={self.dense_steps} is a fraction of a schedule whose length is unknown on a bare model: "
                "patch the pipeline, or give num_steps=..., or give dense_steps as a whole number"
            )
        return round(self.dense_steps * total)

    def is_dense(self, step: int, total: int | None) -> bool:
        """Whether step `step` (from 0) of `total` stays dense."""
        return not self.always_sparse and step < self.first_sparse_step(total)
