"""The Triton backend. Triton itself is imported when the first kernel runs, not before."""

from __future__ import annotations

import torch

from attn_plugins.ops.vmoba.layout import Layout


def gate_scores(q: torch.Tensor, k: torch.Tensor, one: Layout, exact: bool) -> torch.Tensor:
    """(B, H, rows, blocks) float32: of each grid query (`exact`), or of the mean of each tile of them."""
    from attn_plugins.ops.vmoba.triton import gate

    return gate.scores(q, k, one, exact)


def best_blocks(q: torch.Tensor, k: torch.Tensor, one: Layout, count: int, causal: bool = False) -> torch.Tensor | None:
    """(B, H, grid tokens, blocks) bool: the own block of each query and the best others, `count` in all.

    `causal`: blocks after the own one are not taken. None: so many blocks that a row's scores do not fit on chip.
    """
    from attn_plugins.ops.vmoba.triton import gate

    return gate.best(q, k, one, count, causal)


def run_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selected: torch.Tensor, one: Layout, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the exact form: output in q's memory layout, LSE (B, H, N)."""
    from attn_plugins.ops.vmoba.triton import launch

    return launch.forward(q, k, v, selected, one, scale, causal)


def run_backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, selected: torch.Tensor, one: Layout, scale: float, causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Of the exact form: gradients of q, k, v in their own layouts, added in one fixed order."""
    from attn_plugins.ops.vmoba.triton import launch

    return launch.backward(grad_out, grad_lse, q, k, v, out, lse, selected, one, scale, causal)
