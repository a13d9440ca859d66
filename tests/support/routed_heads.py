"""Random problems of `routed_head_attention`, and its rule written anew; seed = case number."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch

from attn_plugins.ops import routed_head_attention
from tests.support.tolerance import sdpa

NAMES = ("out", "q", "k", "v", "gates")


@dataclass(frozen=True)
class Problem:
    """q, k, v, gates, and the options. What no one may read is NaN: skipped rows of q and padding."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: torch.Tensor
    options: dict[str, Any]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.v, self.gates

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(self, **{name: getattr(self, name).to(dtype) for name in NAMES[1:]})

    def real(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which queries (B, N) and keys (B, N_kv) are no padding."""
        batch, queries, keys = self.q.shape[0], self.q.shape[2], self.k.shape[2]
        real = torch.ones(batch, keys, dtype=torch.bool)
        lengths = self.options.get("lengths")
        for b, row in enumerate([] if lengths is None else lengths.tolist()):
            before, valid = row if isinstance(row, list) else (0, row)
            real[b] = torch.tensor([before <= j < before + valid for j in range(keys)])
        same = self.options.get("causal") or queries == keys
        return (real[:, keys - queries :] if same else real.any(1, keepdim=True).expand(-1, queries)), real

    def computed(self) -> torch.Tensor:
        """(B, H, N) bool."""
        active = self.options.get("active")
        wanted = self.gates != 0 if active is None else (self.gates != 0) & active
        return (wanted & self.real()[0][..., None]).transpose(1, 2)

    def mask(self) -> torch.Tensor:
        """(B, 1, N, N_kv) bool: which keys a query sees, if it is computed."""
        queries, keys = self.real()
        mask = queries[:, None, :, None] & keys[:, None, None]
        if self.options.get("causal"):
            i, j = torch.arange(queries.shape[1])[:, None], torch.arange(keys.shape[1])
            mask = mask & (j <= i + keys.shape[1] - queries.shape[1])
        return mask

    def pytorchs(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """What PyTorch makes of it in the precision that these tensors have: all heads, then mask and gate."""
        computed, mask = self.computed()[..., None], self.mask().expand(-1, q.shape[1], -1, -1)
        queries, keys = self.real()
        q = q.masked_fill(~(computed if not self.options.get("dense_backward") else queries[:, None, :, None]), 0.0)
        k, v = (t.masked_fill(~keys[:, None, :, None], 0.0) for t in (k, v))
        scale = self.options.get("scale")
        weights = gates.transpose(1, 2)[..., None]
        out = (sdpa(q, k, v, mask, scale) * weights).masked_fill(~computed, 0.0)
        if not self.options.get("dense_backward"):
            return out
        rest = sdpa(q.detach(), k.detach(), v.detach(), mask, scale).masked_fill(computed, 0.0)
        return out + rest * (weights - weights.detach())

    def ours(self, **more: Any) -> Any:
        return lambda *tensors: routed_head_attention(*tensors, **{**self.options, **more})

    def results(self, attend: Any, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """The output, and gradients for one fixed upstream, in another precision if it is given."""
        tensors = [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in self.tensors]
        out = attend(*tensors)
        rng = torch.Generator().manual_seed(5)
        upstream = torch.randn(out.shape, generator=rng, dtype=torch.float64).to(self.q.dtype).to(out.dtype)
        return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, tensors, upstream)), strict=True))


def random_problem(seed: int, head_dim: int | None = None, longest: int = 200, poison: bool = True) -> Problem:
    """float64. Lists from no token to all, another for every item and head; GQA, padding, chunks, cross attention."""
    dice, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, kv_heads, group = dice.randint(1, 3), dice.randint(1, 3), dice.choice([1, 1, 2, 4])
    heads, queries = kv_heads * group, dice.choice([1, longest, dice.randint(1, longest), dice.randint(1, longest)])
    options: dict[str, Any] = {"causal": dice.random() < 0.6}
    more = queries + dice.choice([0, 0, dice.randint(1, 60)])
    keys = more if options["causal"] else dice.choice([queries, queries, dice.randint(1, longest)])
    dim = head_dim or dice.choice([8, 16, 40])

    def make(count: int, length: int) -> torch.Tensor:
        return torch.randn(batch, length, count, dim, generator=rng, dtype=torch.float64).transpose(1, 2)

    q, k, v = make(heads, queries), make(kv_heads, keys), make(kv_heads, keys)
    if dice.random() < 0.5:
        q, k, v = (t.contiguous() for t in (q, k, v))
    share = torch.tensor([[dice.choice([0.0, 0.1, 0.5, 0.5, 0.75, 1.0]) for _ in range(heads)] for _ in range(batch)])
    wanted = torch.rand(batch, queries, heads, generator=rng) < share[:, None]
    gates = torch.rand(batch, queries, heads, generator=rng, dtype=torch.float64) + 0.2
    if dice.random() < 0.5:
        options["active"] = wanted
        gates = gates * (torch.rand(gates.shape, generator=rng) < 0.95)
    else:
        gates = gates * wanted
    kind = dice.randint(0, 3)
    if kind == 1:
        options["lengths"] = torch.tensor([dice.randint(0, keys) for _ in range(batch)])
    elif kind == 2:
        before = [dice.randint(0, keys) for _ in range(batch)]
        options["lengths"] = torch.tensor([[n, dice.randint(0, keys - n)] for n in before], dtype=torch.int32)
    if dice.random() < 0.3:
        options["scale"] = dice.choice([0.3, -0.2, 0.0])
    options["dense_backward"] = dice.random() < 0.4
    problem = Problem(q, k, v, gates, options)
    if not poison:
        return problem
    rows, seen = problem.real()
    skipped = ~rows[:, None].expand(-1, heads, -1) if options["dense_backward"] else ~problem.computed()
    q = q.masked_fill(skipped[..., None], float("nan"))
    k, v = (t.masked_fill(~seen[:, None, :, None], value) for t, value in ((k, float("nan")), (v, float("inf"))))
    return replace(problem, q=q, k=k, v=v)
