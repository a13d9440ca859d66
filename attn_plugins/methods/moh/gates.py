"""The gates of MoH (arXiv 2410.11842, section 3): which heads a token gets, and how much of each.

In the order of a layer's units: shared ones first, then those that are routed. Scores are float32; a bfloat16 norm
would choose otherwise for one token in eight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Routing:
    """What a router decided for some tokens.

    gates (B, N, H): of every head; 0: not computed. share (B, N, E): of each routed unit in the router's mind, of a sum
    of 1, differentiable (P of the balance loss is their mean). chosen (B, N, E) bool: the K that a token gets. group:
    heads of a unit, which stand together.
    """

    gates: torch.Tensor
    share: torch.Tensor
    chosen: torch.Tensor
    group: int = 1

    @property
    def tokens(self) -> torch.Size:
        """(B, N)."""
        return self.gates.shape[:2]


def choose(scores: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Exactly `count` of the last axis, the largest; of equal ones the first. (..., E) to bool (..., E).

    By ranks: a threshold would let ties through, and `topk` would have to know a tensor's `count` on the host.
    """
    order = scores.detach().argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1) < count


def two_stage(
    routed: torch.Tensor,
    shared: torch.Tensor | None,
    kinds: torch.Tensor | None,
    count: int | torch.Tensor,
    *,
    shared_count: int,
    scale: str = "code",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Learned gates, from logits.

    With p = softmax(W_r x) and the K largest of them chosen, the authors' code has `K * p / sum(chosen p)`, shared
    gates `h_s * softmax(W_s x)` and `[a, b] = 2 * softmax(W_h x)`, by which both are multiplied: gates average 1, and
    equal logits give exactly 1. Equations 5 and 6 of the paper ("paper") lack h_s, 2, K and the sum.

    Args:
        routed: W_r x, (B, N, E). shared: W_s x, (B, N, h_s), None where that is one or none. kinds: W_h x, (B, N, 2),
            for shared and routed ones; None without shared ones. count: K, an int or a tensor of one.
        shared_count: h_s.

    Returns:
        gates (B, N, h_s + E), p (B, N, E), chosen (B, N, E).
    """
    chosen = choose(routed, count)
    share = routed.softmax(dim=-1)
    if scale == "paper":
        gates = share * chosen
    else:
        gates = _times(count, torch.where(chosen, _powers(torch.where(chosen, routed, -torch.inf)), 0.0))
    if not shared_count:
        return gates, share, chosen
    first = gates.new_ones(*gates.shape[:-1], 1) if shared is None else _fractions(shared, scale, shared_count)
    assert kinds is not None  # there are shared ones
    both = _fractions(kinds, scale, 2)
    return torch.cat([both[..., :1] * first, both[..., 1:] * gates], dim=-1), share, chosen


def hard(
    scores: torch.Tensor, count: int | torch.Tensor, shared_count: int, straight_through: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gates 0 or 1: shared ones, and the K largest scores.

    Args:
        scores: (B, N, E), not negative where they are norms. straight_through: the gradient of a gate goes to its
            score as if the gate were it; gates that are 0 too, if the operator gives those any.

    Returns:
        gates (B, N, h_s + E), shares of the scores (B, N, E), chosen (B, N, E).
    """
    chosen = choose(scores, count)
    gates = chosen.to(scores.dtype)
    if straight_through and scores.requires_grad:
        gates = gates + (scores - scores.detach())
    size = scores.clamp(min=0) + torch.finfo(scores.dtype).tiny
    share = size / size.sum(dim=-1, keepdim=True)
    return torch.cat([gates.new_ones(*gates.shape[:-1], shared_count), gates], dim=-1), share, chosen


def query_norms(q: torch.Tensor, group: int = 1) -> torch.Tensor:
    """Scores of heads without a parameter: the norm of their query, of a group that of all of its queries.

    q (B, H, N, D), rotated or not, to (B, N, H / group), in float32.
    """
    norms = torch.linalg.vector_norm(q, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))
    if group > 1:
        norms = torch.linalg.vector_norm(norms.unflatten(1, (-1, group)), dim=2)
    return norms.transpose(1, 2)


def in_heads(gates: torch.Tensor, units: torch.Tensor | None, group: int) -> torch.Tensor:
    """Gates of units, shared ones first, as gates of heads. units (U,): the place of each; None: they are in order."""
    if units is not None:
        gates = gates.index_select(-1, units.argsort())
    return gates.repeat_interleave(group, dim=-1) if group > 1 else gates


def _powers(logits: torch.Tensor) -> torch.Tensor:
    return (logits - logits.detach().amax(dim=-1, keepdim=True)).exp()


def _times(count: int | torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
    """Multiplied before it is divided: K equal ones are exactly 1 each, which K * (1 / K) need not be."""
    return count * powers / powers.sum(dim=-1, keepdim=True)


def _fractions(logits: torch.Tensor, scale: str, count: int) -> torch.Tensor:
    return _times(count if scale == "code" else 1, _powers(logits))
