"""`routed_head_attention`: attention in which every token uses some of the heads, and only those are computed."""

from __future__ import annotations

import torch

from attn_plugins.ops.checks import check_qkv, choose_backend, kernel_refusal, resolve_scale
from attn_plugins.ops.routed_heads.inputs import check_bounds, check_gates
from attn_plugins.ops.routed_heads.op import routed_heads
from attn_plugins.ops.routed_heads.reference import routed_head_reference


def routed_head_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor,
    *,
    active: torch.Tensor | None = None,
    causal: bool = False,
    lengths: torch.Tensor | list[int] | list[list[int]] | int | None = None,
    dense_backward: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Mixture-of-head attention (MoH, arXiv 2410.11842, section 3.2, equation 5), up to the output projection.

        out[b, h, n] = gates[b, n, h] * softmax(scale * q[b, h, n] k^T) v

    A head is not computed for a token whose gate is 0, or which is not `active`: that row of the output is 0. Where a
    share f of the rows is left, 1 / f is what the operations allow. (The authors' code computes all and masks.)

    Args:
        q: (B, H, N, D), any strides.
        k, v: (B, H_kv, N_kv, D); H is a multiple of H_kv.
        gates: (B, N, H), any floating dtype; the output is times these.
        active: (B, N, H) bool; where False the head is not computed, whatever the gate. None is `gates != 0`.
        causal: the last query stands at the last key, and a query sees the keys up to its own; N is at most N_kv.
        lengths: valid tokens of k in each item, (B,): they come first, and padding follows; with padding in front,
            (B, 2) rows of [before, valid]; one number is of all items. Keys that are padding are seen by none, and
            queries that are padding give 0, whatever stands there. Queries are the last N tokens of k where `causal` or
            N = N_kv; else they are other tokens, none of them padding.
        dense_backward: also give the gates that were not computed their gradient, that of gate * attention: for gates
            of 0 and 1 with straight-through gradients. The backward then computes those rows too. q, k and v get
            their gradients through the computed rows alone: the others stand behind a gate of 0.
        scale: of the scores; None is D ** -0.5.
        backend: "auto" ("triton" on CUDA and ROCm, else "cpu"), "triton" (float16, bfloat16, float32; head sizes up to
            256), "cpu" (plain PyTorch on any device), "reference" (dense, by definition).

    Returns:
        (B, H, N, D) in q's memory layout. Differentiable in q, k, v and gates; a gate whose row was not computed has
        a gradient of 0 unless `dense_backward`.

    "cpu" gathers the rows of a head, or computes all and masks, head by head, whichever a cost model says is faster
    (`cost.py`); its backward takes the same parts. The forward of "triton" makes its lists on the device: nothing is
    read back, so lengths are not checked there but cut to k. Its backward is dense, by the block-sparse kernels, with
    the skipped rows masked; it reads `lengths` on the host.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not go together, or numbers out of range.
    """
    check_qkv(q, k, v)
    mask = check_gates(q, gates, active)
    bounds = check_bounds(q, k, causal, lengths)
    factor = resolve_scale(scale, q.shape[-1])
    chosen = choose_backend(backend, q.device, kernels=True, refusal=kernel_refusal(q))
    if chosen == "reference":
        return routed_head_reference(q, k, v, gates, mask, causal, bounds, dense_backward, factor)
    if factor <= 0:  # PyTorch's causal kernel multiplies its -inf by the scale
        q, factor = (-q, -factor) if factor else (q * 0.0, 1.0)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, gates))
    return routed_heads(q, k, v, gates, mask, bounds, causal, dense_backward, factor, chosen == "triton", keep)[0]
