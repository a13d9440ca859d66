"""How many heads each layer gets of those that all layers have together."""

from __future__ import annotations

import heapq

BUDGETS = ("global", "equal")


def allotted(marginals: list[list[float]], total: int, least: list[int], equal: list[int] | None = None) -> list[int]:
    """Units per layer: `total` of them, each where it gives most.

    Args:
        marginals: per layer, what the first, second, ... unit gives, never more than the one before.
        least: per layer, so many at least. total is that and more.
        equal: these, instead.
    """
    if equal is not None:
        return equal
    counts = list(least)
    waiting = [
        (-row[count], layer)
        for layer, (row, count) in enumerate(zip(marginals, counts, strict=True))
        if count < len(row)
    ]
    heapq.heapify(waiting)
    for _ in range(total - sum(counts)):
        _, layer = heapq.heappop(waiting)
        counts[layer] += 1
        if counts[layer] < len(marginals[layer]):
            heapq.heappush(waiting, (-marginals[layer][counts[layer]], layer))
    return counts
