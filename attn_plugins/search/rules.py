"""Rules that say how far something reaches, as a function of the sequence's length: reach = alpha + beta * length."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple


class Rule(NamedTuple):
    """MoA's elastic rule (arXiv 2406.14909, section 4.1): tokens, and tokens per token of the sequence."""

    alpha: int
    beta: float

    def span(self, length: int) -> int:
        """Tokens that are reached in a sequence of `length`: at least 0, at most all."""
        return min(max(int(self.alpha + self.beta * length), 0), length)


def rule_grid(shortest: int, longest: int, *, step: int | None = None, parts: int = 8) -> list[Rule]:
    """All rules of a grid that make sense for sequences of `shortest` tokens and more, by alpha, then beta.

    Alpha goes from -shortest to longest in steps of `step`, beta from 0 to 1 in `parts` parts. A rule stays if it is
    within the sequence at the longest length that is profiled, and so at all longer ones, and positive at the shortest.
    With 2,048 and 8,192 these are the paper's 48 rules.

    Args:
        shortest, longest: lengths of the profile, tokens.
        step: tokens; None is half of the shortest length, the paper's 1,024 at 2,048.

    Raises:
        ValueError: lengths out of order, a step or number of parts below 1.
    """
    step = max(shortest // 2, 1) if step is None else step
    if not 1 <= shortest <= longest:
        raise ValueError(f"shortest={shortest}, longest={longest}: give 1 <= shortest <= longest")
    if step < 1 or parts < 1:
        raise ValueError(f"step={step}, parts={parts}: give 1 or more of each")
    found = []
    for alpha in range(-(shortest // step) * step, longest + 1, step):
        for part in range(parts + 1):
            beta = Fraction(part, parts)
            if alpha + beta * shortest > 0 and alpha + beta * longest <= longest:
                found.append(Rule(alpha, float(beta)))
    return found
