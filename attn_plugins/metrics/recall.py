"""How much of dense attention a sparse choice of keys keeps, on a few rows: recall, and the best that was to be had.

Exact and never N x N: whoever asks brings the rows (vmoba's paper, arXiv 2506.23858, and its peers report recall so).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

GOLDEN = 0.6180339887498949


def spread(count: int, most: int) -> torch.Tensor:
    """(min(count, most),) int64, ascending: numbers below `count`, one from each of as many equal stretches.

    Where in a stretch differs from one to the next by the golden ratio, so that no width of a grid is in step with it.

    Raises:
        ValueError: nothing to take from, or nothing to take.
    """
    if count < 1 or most < 1:
        raise ValueError(f"{most} rows of {count}: give 1 or more of 1 or more")
    number = torch.arange(min(count, most))
    begin, end = number * count // len(number), (number + 1) * count // len(number)
    return begin + (number.double() * GOLDEN % 1 * (end - begin)).long()


def attention_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shown: torch.Tensor, scale: float,
    *, bias: torch.Tensor | None = None, softcap: float | None = None, sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Dense attention of some rows of one head, by definition, in at least float32.

    Args:
        q: (R, D); k: (N, D); v: (N, E).
        shown: (R, N) bool, the keys that a row may see; a row without any has weights of 0.
        bias: (R, N), added to the scores; softcap, sink: as in `AttentionCall`, the sink one number.

    Returns:
        (weights (R, N), output (R, E)).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).T) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    scores = scores.masked_fill(~shown, float("-inf"))
    total = scores.logsumexp(-1, keepdim=True)
    total = total.masked_fill(total == float("-inf"), 0.0)  # a row that sees nothing
    if sink is not None:
        total = torch.logaddexp(total, sink.to(wide))
    weights = (scores - total).exp()
    return weights, weights @ v.to(wide).masked_fill(~shown.any(0)[:, None], 0.0)


@dataclass(frozen=True)
class RowShares:
    """Of some rows, float64 (R,): `recall`, the share of the dense weights on the keys that a row keeps; `oracle`, the
    share on the best choice of as many units; `kept` and `shown`, numbers of keys."""

    recall: torch.Tensor
    oracle: torch.Tensor
    kept: torch.Tensor
    shown: torch.Tensor


def row_shares(weights: torch.Tensor, shown: torch.Tensor, unit_of: torch.Tensor, chosen: torch.Tensor) -> RowShares:
    """Shares of one head's rows; nan where a row sees nothing.

    The oracle of a row takes as many units as the row has, those that hold most weight: blocks where blocks are
    chosen, keys where single keys are. Units of which dense attention shows a row no key are not counted.

    Args:
        weights, shown: (R, N), of `attention_rows`.
        unit_of, chosen: (N,) int64 and (R, units) bool, as in `method.Kept`.
    """
    weights = weights.double()
    free = unit_of < 0
    kept = shown & (free | chosen[:, unit_of.clamp(min=0)])
    total = weights.sum(-1)
    units = unit_of[~free]
    mass = weights.new_zeros(chosen.shape).index_add_(1, units, weights[:, ~free])
    keys = weights.new_zeros(chosen.shape).index_add_(1, units, shown[:, ~free].double())
    number = (chosen & (keys > 0)).sum(-1)
    best = weights[:, free].sum(-1)
    for most in torch.unique(number).tolist():
        rows = number == most
        best[rows] += mass[rows].topk(most, sorted=False).values.sum(-1)
    recall = torch.where(kept, weights, 0.0).sum(-1)
    return RowShares(recall / total, best / total, kept.sum(-1).double(), shown.sum(-1).double())
