"""The Triton backend. Triton itself is imported when the first kernel runs, not before."""

from __future__ import annotations

import torch

from attn_plugins.plan.block_plan import BlockPlan


def run_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output in q's memory layout, LSE (B, H, N); by PyTorch's dense kernel where the plan is known to be dense."""
    from attn_plugins.ops.block_sparse.triton import launch
    from attn_plugins.ops.block_sparse.triton.dense import dense_forward

    if plan.lists.device.type == "cpu" and plan.is_dense:  # of lists on a device one would have to wait for the answer
        found = dense_forward(q, k, v, scale)
        if found is not None:
            return found
    return launch.forward(q, k, v, plan, scale)


def run_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: BlockPlan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v in their own layouts. Dense plans too: PyTorch's dense backward adds in no fixed order."""
    from attn_plugins.ops.block_sparse.triton import launch

    return launch.backward(grad_out, grad_lse, q, k, v, out, lse, plan, scale)
