"""Dense attention with LSE by PyTorch's fused GPU kernels: what a plan without a hole dispatches to."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend


def dense_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Output in q's memory layout and LSE (B, H, N), or None where PyTorch would choose no kernel that has one."""
    if q.device.type != "cuda" or q.dtype == torch.float32:
        return None
    choice = torch._fused_sdp_choice(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if choice == SDPBackend.CUDNN_ATTENTION.value:
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    elif choice == SDPBackend.FLASH_ATTENTION.value and q.shape[-1] % 8 == 0:  # SDPA itself pads other sizes
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    else:
        return None
    out, lse = found[0], found[1].reshape(q.shape[:3])
    return (out if out.stride() == q.stride() else torch.empty_like(q).copy_(out)), lse
