"""Masked attention checked on sampled rows, forward and gradients, against float64.

The upstream gradient is zero outside the sampled rows, so the gradients of *all* keys and values follow from those rows
alone: exact, and no N x N matrix is made. A sparse kernel still runs over everything it would run over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_plugins.pipelines.benching.sides import Run, Verdict

# (query heads (h,), rows (R,)) to a bool mask (h or 1, R, N_kv)
MaskRows = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SampledAttention:
    """The last batch item, the query heads of the first and the last KV head, `count` rows.

    An error may be twice PyTorch's own in the same precision, on the same rows, plus rounding.
    """

    leaves: tuple[torch.Tensor, ...]  # q (B, H, N, D), k, v (B, H_kv, N_kv, D)
    mask_rows: MaskRows
    count: int = 128
    scale: float | None = None
    _expected: dict[bool, tuple[list[torch.Tensor], list[torch.Tensor]]] = field(default_factory=dict, repr=False)

    @property
    def rows(self) -> torch.Tensor:
        return sampled_rows(self.leaves[0].shape[2], self.count).to(self.leaves[0].device)

    def judge(self, run: Run, gradients: bool) -> Verdict:
        q, k, v = self.leaves
        kv_heads = sorted({0, k.shape[1] - 1})
        group = q.shape[1] // k.shape[1]
        heads = torch.tensor([kv * group + i for kv in kv_heads for i in range(group)], device=q.device)
        rows = self.rows
        mask = self.mask_rows(heads, rows)
        parts = (q[-1, heads][:, rows], k[-1, kv_heads], v[-1, kv_heads])
        generator = torch.Generator(q.device).manual_seed(2)
        upstream = torch.randn(parts[0].shape, generator=generator, device=q.device, dtype=q.dtype)

        if gradients not in self._expected:
            exact = self._by_pytorch([t.double() for t in parts], mask, upstream.double(), gradients)
            self._expected[gradients] = exact, self._by_pytorch(parts, mask, upstream, gradients)
        exact, theirs = self._expected[gradients]
        ours = self._ours(run, heads, kv_heads, rows, upstream, gradients)
        names = ("out", "dq", "dk", "dv")[: len(ours)]
        return Verdict({name: compare(*row) for name, *row in zip(names, ours, theirs, exact, strict=True)})

    def _ours(self, run, heads, kv_heads, rows, upstream, gradients: bool) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
        with torch.set_grad_enabled(gradients):
            leaves = [t.detach().requires_grad_(gradients) for t in self.leaves]
            out = run(*leaves)
        found = [all_finite(out.detach())[-1, heads][:, rows]]
        if gradients:
            everywhere = torch.zeros_like(out)
            everywhere[-1, heads[:, None], rows[None]] = upstream
            dq, dk, dv = (all_finite(t) for t in torch.autograd.grad(out, leaves, everywhere))
            found += [dq[-1, heads][:, rows], dk[-1, kv_heads], dv[-1, kv_heads]]
        return found

    def _by_pytorch(self, parts, mask, upstream, gradients: bool) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
        """Attention of the sampled rows by PyTorch, in the precision that `parts` have."""
        q, k, v = (t.detach().requires_grad_(gradients) for t in parts)
        with torch.set_grad_enabled(gradients), rounding_kernels(q):
            wide_k, wide_v = (t.repeat_interleave(q.shape[0] // k.shape[0], 0)[None] for t in (k, v))
            out = F.scaled_dot_product_attention(q[None], wide_k, wide_v, attn_mask=mask[None], scale=self.scale)[0]
            grads = torch.autograd.grad(out, (q, k, v), upstream) if gradients else ()
        return [out.detach(), *grads]


def sampled_rows(length: int, count: int) -> torch.Tensor:
    """Both ends, and the rest at random but always the same; ascending."""
    if length <= count:
        return torch.arange(length)
    inner = torch.randperm(length - 2, generator=torch.Generator().manual_seed(1))[: count - 2] + 1
    return torch.cat([inner, torch.tensor([0, length - 1])]).sort().values


def rounding_kernels(q: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """On a GPU PyTorch's fallback works in float32 throughout; its fused kernel rounds where any fused kernel does."""
    if q.device.type != "cuda" or q.dtype == torch.float64:
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)


def all_finite(t: torch.Tensor) -> torch.Tensor:
    """All of `t`, or nan everywhere if any of it is not finite: what is not sampled must be clean too."""
    return t if bool(torch.isfinite(t).all()) else torch.full_like(t, float("nan"))


def compare(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Error and allowance, in the precision of `theirs`."""
    allowed = 2 * (theirs.double() - exact).abs().max().item()
    allowed += torch.finfo(theirs.dtype).eps * exact.abs().max().item()
    return (ours.double() - exact).abs().max().item(), allowed
