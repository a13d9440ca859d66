"""What a mask is to a benchmark: a rule, an exact area, and what other kernels' options can say of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from attn_plugins.pipelines.benching.oracle import SampledAttention
from attn_plugins.pipelines.benching.sides import Built, Cannot, Oracle, Setting, random_qkv
from attn_plugins.plan.block_plan import BlockPlan

Tables = tuple[torch.Tensor, torch.Tensor]  # blocks seen in part or whole, and those seen whole: (H or 1, Q, K) bool


@dataclass(frozen=True)
class Shape:
    """Of q (B, H, N, D), k and v (B, H_kv, N, D), but for D."""

    tokens: int
    heads: int = 4
    kv_heads: int = 4
    batch: int = 1


@dataclass(frozen=True)
class Told:
    """A mask in the words of kernels that have options instead of masks.

    Args:
        causal: no query sees a key behind it.
        documents: lengths of documents that do not see each other; () is one.
        window: keys that a query sees to its left and right; -1 is no limit.
    """

    causal: bool = False
    documents: tuple[int, ...] = ()
    window: tuple[int, int] = (-1, -1)


class Mask(ABC):
    """A problem of one shape; all masks are over N x N pairs of tokens."""

    shape: Shape
    option: str  # "window 1024"
    told: Told | None = None  # None: no option says it
    causal: bool = False  # no query sees a key behind it: the baseline is causal then
    by_head: bool = False  # heads differ
    plain: bool = True  # masked attention; otherwise another function of q, k, v, which others do not compute

    @abstractmethod
    def seen(self, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether a query token of a head sees a key token, broadcasting; the definition."""

    @property
    @abstractmethod
    def pairs(self) -> float:
        """Pairs that are seen, the mean over heads: exact, and made without N x N of anything."""

    @property
    def density(self) -> float:
        """Share of all pairs that are seen."""
        return self.pairs / self.shape.tokens**2

    def leaves(self, setting: Setting) -> tuple[torch.Tensor, ...]:
        """q, k, v (and what else there is), random."""
        shape = self.shape
        return random_qkv(shape.batch, shape.tokens, shape.heads, shape.kv_heads, setting)

    def oracle(self, leaves: tuple[torch.Tensor, ...]) -> Oracle:
        return SampledAttention(leaves, self.rows)

    def rows(self, heads: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(h, R, N) bool of some query heads and rows."""
        keys = torch.arange(self.shape.tokens, device=rows.device)
        return self.seen(heads[:, None, None], rows[None, :, None], keys[None, None]).expand(len(heads), -1, -1)

    def resolved(self, leaves: tuple[torch.Tensor, ...]) -> Mask:
        """The mask itself, or of one that depends on q and k what they make of it."""
        return self

    def flex(self, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> Built:
        """Flex attention with this mask; compiled, but for a dry run."""
        raise Cannot("no mask of pairs says it")

    def plan(self, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> BlockPlan:
        """The block plan for our operator, in q's head count or shared."""
        raise Cannot("its own operator makes the plan: see ours_operator")

    def operator(self, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> Built:
        """Our own operator for it, other than block-sparse attention over a plan."""
        raise Cannot("no operator of its own: see ours_plan")
