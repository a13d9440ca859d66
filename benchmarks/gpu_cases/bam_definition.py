"""Soft attention experts (BAM, arXiv 2408.08274) by their definition, on sampled rows: what the check goes by.

    out = sum_i g_i(x) MHA_i(x),  g = softmax(W x)

Nothing here comes from the library, so that a fault in it cannot hide: experts are taken one by one out of the wide
weights, in the order of heads that docs/bam.md gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from attn_plugins.pipelines.benching.oracle import all_finite, compare, rounding_kernels, sampled_rows
from attn_plugins.pipelines.benching.sides import Run, Verdict

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SampledExperts:
    """The last batch item, `count` rows, all experts and heads.

    Args:
        x: (B, S, C), what comes in.
        weights: q, k, v, o of all experts and the router, (rows, C), o (C, rows).
        rotation: cos and sin, (S, D) each, of halves.
        cache: keys and values before x, (B, kv_heads, T, D) each, the last of which x's own takes; None: x is a whole
            text, causal.
        shared: keys and values are of all experts; heads: of one expert.
    """

    x: torch.Tensor
    weights: Mapping[str, torch.Tensor]
    rotation: tuple[torch.Tensor, torch.Tensor]
    cache: tuple[torch.Tensor, torch.Tensor] | None
    shared: bool
    heads: int
    count: int = 128
    _expected: dict[bool, tuple[Tensors, Tensors]] = field(default_factory=dict, repr=False)

    def judge(self, run: Run, gradients: bool) -> Verdict:
        rows = sampled_rows(self.x.shape[1], self.count).to(self.x.device)
        generator = torch.Generator(self.x.device).manual_seed(2)
        shape = (len(rows), self.x.shape[2])
        upstream = torch.randn(shape, generator=generator, device=self.x.device, dtype=self.x.dtype)
        if gradients not in self._expected:
            exact = self._by_definition(torch.float64, rows, upstream.double(), gradients)
            with rounding_kernels(self.x):
                theirs = self._by_definition(self.x.dtype, rows, upstream, gradients)
            self._expected[gradients] = exact, theirs
        exact, theirs = self._expected[gradients]
        with torch.set_grad_enabled(gradients):
            x = self.x.detach().requires_grad_(gradients)
            out = run(x)
        found = {"out": all_finite(out.detach())[-1, rows]}
        if gradients:
            everywhere = torch.zeros_like(out)
            everywhere[-1, rows] = upstream
            found["dx"] = all_finite(torch.autograd.grad(out, x, everywhere)[0])[-1]
        return Verdict({name: compare(found[name], theirs[name], exact[name]) for name in exact})

    def _by_definition(
        self, dtype: torch.dtype, rows: torch.Tensor, upstream: torch.Tensor, gradients: bool
    ) -> Tensors:
        w = {name: weight.to(dtype) for name, weight in self.weights.items()}
        x = self.x[-1].detach().to(dtype).requires_grad_(gradients)
        experts = len(self.weights["router"])
        with torch.set_grad_enabled(gradients):
            exact = torch.promote_types(dtype, torch.float32)  # routers keep to float32
            gates = (x[rows].to(exact) @ w["router"].to(exact).T).softmax(-1).to(dtype)
            out = sum(gates[:, i, None] * self._expert(i, experts, w, x, rows) for i in range(experts))
            assert isinstance(out, torch.Tensor)  # there is an expert
            found = {"out": out.detach()}
            if gradients:
                found["dx"] = torch.autograd.grad(out, x, upstream)[0]
        return found

    def _expert(self, i: int, experts: int, w: Tensors, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """MHA_i of the rows, (rows, C)."""
        dim = self.rotation[0].shape[-1]
        kv_heads = len(w["k"]) // dim // (1 if self.shared else experts)
        group = self.heads // kv_heads
        if self.shared:  # (KV head, expert, head of its group)
            own = lambda t: t.unflatten(0, (kv_heads, experts, group * dim))[:, i].flatten(0, 1)  # noqa: E731
            key, value = w["k"], w["v"]
        else:  # (expert, head)
            own = lambda t: t.unflatten(0, (experts, -1))[i]  # noqa: E731
            key, value = own(w["k"]), own(w["v"])
        q = self._rotated((x[rows] @ own(w["q"]).T).unflatten(-1, (-1, dim)).transpose(0, 1), rows)
        k = self._rotated((x @ key.T).unflatten(-1, (-1, dim)).transpose(0, 1), slice(None))
        v = (x @ value.T).unflatten(-1, (-1, dim)).transpose(0, 1)
        mask = torch.arange(len(x), device=x.device) <= rows[:, None]
        if self.cache is not None:
            mine = slice(None) if self.shared else slice(i * kv_heads, (i + 1) * kv_heads)
            before = [t[-1, mine, :-1].to(x.dtype) for t in self.cache]
            k, v = (torch.cat([old, new], 1) for old, new in zip(before, (k, v), strict=True))
            mask = torch.ones(len(rows), k.shape[1], dtype=torch.bool, device=x.device)
        k, v = (t.repeat_interleave(group, 0) for t in (k, v))
        heads = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]
        return heads.transpose(0, 1).flatten(1) @ own(w["o"].T)

    def _rotated(self, t: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        cos, sin = (part[rows].to(t.dtype) for part in self.rotation)
        one, other = t.chunk(2, -1)
        return t * cos + torch.cat([-other, one], -1) * sin
