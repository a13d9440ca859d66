"""A mean and how sure it is: the 95 % interval from the spread between what was sampled independently; quantiles."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

WIDE = 1.96  # standard errors of half a 95 % interval


@dataclass(frozen=True)
class Interval:
    """A mean, and the ends of its 95 % interval: nan where one sample alone tells nothing of the spread."""

    mean: float
    low: float
    high: float

    def through(self, function: Callable[[float], float]) -> Interval:
        """Its values under an increasing function: a mean loss becomes a perplexity by `math.exp`."""
        return Interval(function(self.mean), function(self.low), function(self.high))

    def within(self, least: float, most: float) -> Interval:
        """Its ends cut where the quantity itself ends: no share is above 1."""
        return Interval(
            self.mean, *(min(max(end, least), most) if end == end else end for end in (self.low, self.high))
        )


def mean_interval(values: Iterable[float]) -> Interval:
    """Of independent samples (documents, prompts, pictures), by the normal approximation.

    Raises:
        ValueError: no samples.
    """
    values = list(values)
    if not values:
        raise ValueError("no samples: an interval needs one at least, and two to be more than a point")
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return Interval(mean, math.nan, math.nan)
    half = WIDE * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def quantile(values: torch.Tensor, share: float) -> float:
    """The value at `share` of the sorted ones (the nearest); `torch.quantile` takes no more than 16 million.

    Raises:
        ValueError: no values.
    """
    ordered = values.flatten().sort().values
    if not len(ordered):
        raise ValueError("no values: a quantile needs one at least")
    return float(ordered[min(round(share * (len(ordered) - 1)), len(ordered) - 1)])
