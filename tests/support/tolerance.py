"""The tolerance rule: at most twice PyTorch's own error in the same precision, against float64, plus rounding.

The allowance is measured for each problem and never written down, so no one can widen it.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None) -> torch.Tensor:
    """PyTorch's masked attention, by the kernel that it chooses; rows that see nothing give 0."""
    empty = ~mask.any(-1, keepdim=True)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask | empty, scale=scale).masked_fill(empty, 0.0)


def allowance(theirs: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error that a result of `theirs`' precision may have."""
    error = (theirs.double() - exact).abs().max().item()
    rounding = torch.finfo(theirs.dtype).eps * exact.abs().max().item()
    return 2 * error + rounding


def within(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether `ours` is as good as the rule asks; `exact` is in float64, `theirs` is PyTorch's in our precision."""
    assert ours.dtype == theirs.dtype and ours.shape == exact.shape
    return bool((ours.double() - exact).abs().max().item() <= allowance(theirs, exact))
