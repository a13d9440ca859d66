"""MIP's merge (arXiv 2409.17920) by its definition, on sampled rows: what the check goes by.

Nothing here comes from the library, so that a fault in it cannot hide. The weights need all positions and heads, and
are constants of the backward; output and gradients of sampled rows follow from a few heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from attn_plugins.pipelines.benching.oracle import all_finite, compare, rounding_kernels, sampled_rows
from attn_plugins.pipelines.benching.sides import Run, Verdict

LEAVES = ("q", "text_k", "text_v", "phrase_k", "image_k", "image_v")
NO_GRADIENT = ("phrase_k",)  # the relevance is detached
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SampledMerge:
    """The last batch item, its first and last head, `count` rows.

    leaves, in the order of LEAVES: (B, H, S, D), two of (B, H, M, D), (1, R, H, L, D), two of (B, R, H, T, D).
    """

    leaves: tuple[torch.Tensor, ...]
    scale: float
    count: int = 128
    _expected: dict[bool, tuple[Tensors, Tensors]] = field(default_factory=dict, repr=False)

    def judge(self, run: Run, gradients: bool) -> Verdict:
        q = self.leaves[0]
        rows = sampled_rows(q.shape[2], self.count).to(q.device)
        heads = torch.tensor(sorted({0, q.shape[1] - 1}), device=q.device)
        generator = torch.Generator(q.device).manual_seed(2)
        shape = (len(heads), len(rows), q.shape[3])
        upstream = torch.randn(shape, generator=generator, device=q.device, dtype=q.dtype)
        if gradients not in self._expected:
            wide = [t.double() for t in self.leaves]
            exact = self._by_definition(wide, heads, rows, upstream.double(), gradients)
            with rounding_kernels(q):
                theirs = self._by_definition(list(self.leaves), heads, rows, upstream, gradients)
            self._expected[gradients] = exact, theirs
        exact, theirs = self._expected[gradients]
        ours = self._ours(run, heads, rows, upstream, gradients)
        return Verdict({name: compare(ours[name], theirs[name], exact[name]) for name in exact})

    def _ours(
        self, run: Run, heads: torch.Tensor, rows: torch.Tensor, upstream: torch.Tensor, gradients: bool
    ) -> Tensors:
        with torch.set_grad_enabled(gradients):
            leaves = [t.detach().requires_grad_(gradients) for t in self.leaves]
            out = run(*leaves)
        found = {"out": all_finite(out.detach())[-1, heads][:, rows]}
        if gradients:
            everywhere = torch.zeros_like(out)
            everywhere[-1, heads[:, None], rows[None]] = upstream
            grads = torch.autograd.grad(out, leaves, everywhere, allow_unused=True)
            for name, t in zip(LEAVES, grads, strict=True):
                if name in NO_GRADIENT:
                    continue
                if t is None:
                    raise ValueError(f"no gradient of {name}")
                part = all_finite(t)[-1]
                found[f"d{name}"] = part[heads][:, rows] if name == "q" else part[..., heads, :, :]
        return found

    def _weights(self, q: torch.Tensor, phrase_k: torch.Tensor) -> torch.Tensor:
        """w (R, S) from all heads of the last item, in at least float32."""
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = self.scale * torch.einsum("rhld,hsd->rhls", phrase_k[-1].to(wide), q[-1].to(wide))
        relevance = torch.softmax(scores, dim=-1).mean((1, 2))
        return relevance / relevance.sum(0)

    def _by_definition(
        self,
        leaves: list[torch.Tensor],
        heads: torch.Tensor,
        rows: torch.Tensor,
        upstream: torch.Tensor,
        gradients: bool,
    ) -> Tensors:
        """In the precision of the leaves."""
        q, text_k, text_v, phrase_k, image_k, image_v = leaves
        weights = self._weights(q, phrase_k)[:, rows]
        parts = {
            "q": q[-1, heads][:, rows], "text_k": text_k[-1, heads], "text_v": text_v[-1, heads],
            "image_k": image_k[-1][:, heads], "image_v": image_v[-1][:, heads],
        }  # fmt: skip
        with torch.set_grad_enabled(gradients):
            at = {name: t.detach().requires_grad_(gradients) for name, t in parts.items()}
            out = self._attend(at["q"], at["text_k"], at["text_v"])
            for i, weight in enumerate(weights):
                attended = self._attend(at["q"], at["image_k"][i], at["image_v"][i])
                out = out + (weight[None, :, None] * attended).to(out.dtype)
        if not gradients:
            return {"out": out}
        grads = torch.autograd.grad(out, list(at.values()), upstream)
        return {"out": out.detach(), **{f"d{name}": t for name, t in zip(at, grads, strict=True)}}

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.dtype == torch.float64:
            return torch.softmax(self.scale * q @ k.transpose(-1, -2), dim=-1) @ v
        return F.scaled_dot_product_attention(q[None], k[None], v[None], scale=self.scale)[0]
