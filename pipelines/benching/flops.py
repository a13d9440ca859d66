"""What a mask costs: floating-point operations of the pairs that it needs, and of those that a backend computes."""

from __future__ import annotations

from attn_plugins.pipelines.benching.masks.mask import Shape
from attn_plugins.pipelines.benching.sides import BACKWARD, FORWARD, TRAINING

# Products of N x N x D: two in the forward; five in the backward, which makes the scores again.
PRODUCTS = {FORWARD: 2.0, BACKWARD: 5.0, TRAINING: 7.0}


def gflop(pairs: float, shape: Shape, head_dim: int, direction: str) -> float:
    """10^9 operations over `pairs` (query, key) pairs of each head: 2 D for a product of a pair; -1 for less than 0."""
    return -1.0 if pairs < 0 else 2e-9 * head_dim * PRODUCTS[direction] * pairs * shape.batch * shape.heads
