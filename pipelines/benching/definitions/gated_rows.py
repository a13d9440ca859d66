"""Routed heads (arXiv 2410.11842) by their definition: attention times a gate for each token and head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from attn_plugins.pipelines.benching.oracle import SampledAttention, rounding_kernels


@dataclass(frozen=True)
class GatedRows(SampledAttention):
    """Sampled rows of attention, times their gates (B, N, H)."""

    gates: torch.Tensor = None  # type: ignore[assignment]  # behind fields that have defaults

    def _by_pytorch(self, parts, mask, upstream, gradients: bool) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
        q, k, v = (t.detach().requires_grad_(gradients) for t in parts)
        group = q.shape[0] // k.shape[0]
        last = self.leaves[0].shape[1] - group
        heads = [*range(group), *range(last, last + group)][: q.shape[0]]
        weights = self.gates[-1][self.rows][:, heads].T[..., None].to(q.dtype)
        with torch.set_grad_enabled(gradients), rounding_kernels(q):
            wide_k, wide_v = (t.repeat_interleave(group, 0)[None] for t in (k, v))
            out = F.scaled_dot_product_attention(q[None], wide_k, wide_v, attn_mask=mask[None], scale=self.scale)[0]
            out = out * weights
            grads = torch.autograd.grad(out, (q, k, v), upstream) if gradients else ()
        return [out.detach(), *grads]
