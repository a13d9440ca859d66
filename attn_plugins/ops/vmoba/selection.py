"""Which blocks a row keeps (arXiv 2506.23858): a rule and a scope, always within one batch item.

A row is a query, or a tile of them. Its own block comes first, the others by their scores, ties by number; each rule
comes down to how many of that order the row keeps. Nothing is read on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

RULES = ("topk", "threshold", "top_p")
SCOPES = ("query", "head")


@dataclass(frozen=True)
class Selection:
    """How many blocks a row keeps, its own counted.

    Args:
        rule: "topk" keeps the `k_blocks` best. "threshold" and "top_p" keep the fewest whose weights reach `tau` of the
            total; a weight is the score, min-max normalised ("threshold", the paper's), or its softmax ("top_p").
        scope: "query": each row for itself. "head": `k_blocks` times the rows of a head are ranked together, weights
            are normalised over and summed over all pairs of a head: the paper's "global", of one batch item.
        k_blocks, tau: of the rules; tau of 1 and more keeps all.
        min_blocks, max_blocks: bounds on what a row keeps; None is no bound.

    Raises:
        ValueError: an unknown rule or scope, the rule's own number missing or illegal, or bounds that cross.
    """

    rule: str = "topk"
    scope: str = "query"
    k_blocks: int | None = None
    tau: float | None = None
    min_blocks: int = 1
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        for name, legal in (("rule", RULES), ("scope", SCOPES)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r}: legal are {', '.join(legal)}")
        if self.rule == "topk":
            if not _counts(self.k_blocks):
                raise ValueError(
                    f"k_blocks={self.k_blocks!r}: rule='topk' needs a number of blocks, the own one counted"
                )
        elif self.tau is None or not self.tau >= 0:
            raise ValueError(
                f"tau={self.tau!r}: rule={self.rule!r} needs a share of the total, 0 or more (1 keeps all)"
            )
        if not _counts(self.min_blocks):
            raise ValueError(f"min_blocks={self.min_blocks!r}: a row keeps 1 block or more, its own")
        if self.max_blocks is not None and not (_counts(self.max_blocks) and self.max_blocks >= self.min_blocks):
            raise ValueError(f"max_blocks={self.max_blocks!r}: give min_blocks={self.min_blocks} or more, or None")

    def number(self, blocks: int) -> int | None:
        """How many of so many blocks every row keeps; None: that depends on the scores."""
        if self.rule != "topk" or self.scope != "query" or self.k_blocks is None:
            return None
        return min(max(self.k_blocks, self.min_blocks), self.max_blocks or blocks, blocks)

    def width(self, blocks: int) -> int:
        """The most blocks that a row can keep, of so many."""
        return self.number(blocks) or min(self.max_blocks or blocks, blocks)


def _counts(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def ranked(scores: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """(B, H, R, C) int64: the blocks of each row, its own first, then by score, ties by number."""
    first = scores.scatter(-1, own.expand(*scores.shape[:2], -1)[..., None], float("inf"))
    return torch.sort(first, dim=-1, descending=True, stable=True).indices


def kept(scores: torch.Tensor, own: torch.Tensor, order: torch.Tensor, how: Selection, scale: float) -> torch.Tensor:
    """(B, H, R) int64: how many of `order` each row keeps.

    Args:
        scores: (B, H, R, C); -inf where a row may not see a block.
        own: (R,) int64, the block of each row.
        order: `ranked(scores, own)`.
        scale: of the scores, for "top_p".
    """
    blocks = scores.shape[-1]
    if how.rule == "topk":
        assert how.k_blocks is not None  # Selection has checked
        number = min(how.k_blocks, blocks)
        if how.scope == "query":
            count = order.new_full(order.shape[:3], number)
        else:
            count = 1 + _best_pairs(scores, own, (number - 1) * scores.shape[2])
    else:
        assert how.tau is not None
        if how.tau >= 1:
            count = order.new_full(order.shape[:3], blocks)
        elif how.scope == "query":
            shares = _weights(scores, how.rule, scale, (-1,)).gather(-1, order).cumsum(-1)
            count = 1 + (shares < how.tau * shares[..., -1:]).sum(-1)
        else:
            count = 1 + _best_shares(_weights(scores, how.rule, scale, (-2, -1)), own, how.tau)
    return count.clamp(min(how.min_blocks, blocks), how.width(blocks))


def _best_pairs(scores: torch.Tensor, own: torch.Tensor, number: int) -> torch.Tensor:
    """(B, H, R): how many of the `number` best (row, block) pairs of a head, own ones aside, each row has."""
    others = _without_own(scores, own, float("-inf")).flatten(2)
    best = torch.sort(others, dim=-1, descending=True, stable=True).indices[..., :number]
    return _rows_of(best, torch.ones_like(best), scores.shape)


def _best_shares(weights: torch.Tensor, own: torch.Tensor, tau: float) -> torch.Tensor:
    """(B, H, R): how many others each row has in the shortest prefix of a head's pairs that reaches `tau`."""
    weights = weights.double()  # sums of many
    mine = weights.gather(-1, own.expand(*weights.shape[:2], -1)[..., None]).sum((-2, -1))[..., None]
    others = torch.sort(_without_own(weights, own, -1.0).flatten(2), dim=-1, descending=True, stable=True)
    before = mine + others.values.clamp(min=0).cumsum(-1).roll(1, -1)  # of all that rank above
    before[..., 0] = mine[..., 0]
    needed = before < tau * weights.sum((-2, -1))[..., None]
    return _rows_of(others.indices, (needed & (others.values >= 0)).long(), weights.shape)


def _rows_of(pairs: torch.Tensor, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Values of flat (row, block) pairs, summed by row: whole numbers, so the order of the sums is of no account."""
    rows = torch.zeros(shape[:3], dtype=torch.int64, device=pairs.device)
    return rows.scatter_add_(-1, torch.div(pairs, shape[3], rounding_mode="floor"), values)


def _without_own(scores: torch.Tensor, own: torch.Tensor, value: float) -> torch.Tensor:
    return scores.scatter(-1, own.expand(*scores.shape[:2], -1)[..., None], value)


def _weights(scores: torch.Tensor, rule: str, scale: float, dims: tuple[int, ...]) -> torch.Tensor:
    """Weights of 0 and more, over some dims: scores min-max normalised (1 where all are equal), or their softmax."""
    high = scores.amax(dims, keepdim=True)
    if rule == "top_p":
        extreme = high if scale >= 0 else scores.amin(dims, keepdim=True)
        return torch.exp(scale * (scores - extreme))
    low = scores.amin(dims, keepdim=True)
    return torch.where(high > low, (scores - low) / (high - low), 1.0)
