"""Dense attention, by every kernel that PyTorch or an installed FlashAttention has: the fastest is the baseline."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_plugins.pipelines.benching.backends.flash_attention import MODULES as PACKAGES
from attn_plugins.pipelines.benching.backends.sdpa import KERNELS
from attn_plugins.pipelines.benching.sides import Built, Run, Side

BACKENDS = {
    "cudnn": KERNELS["sdpa_cudnn"],
    "sdpa_flash": KERNELS["sdpa_flash"],
    "sdpa_efficient": KERNELS["sdpa_efficient"],
}


def dense_sides(device: torch.device, kv_groups: int = 1) -> tuple[Side, ...]:
    """One side per kernel. On a CPU (the dry run) there is one kernel, and nothing to choose."""
    if device.type != "cuda":
        return (Side("sdpa", "dense", lambda: Built(_attend(kv_groups), 1.0)),)
    sides = [Side(name, "dense", _forced(kind, kv_groups)) for name, kind in BACKENDS.items()]
    sides += [Side(name, "dense", _packaged(module)) for name, module in PACKAGES.items()]
    return tuple(sides)


def _attend(kv_groups: int) -> Run:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=kv_groups > 1)


def _forced(kind: SDPBackend, kv_groups: int) -> Callable[[], Built]:
    attend = _attend(kv_groups)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(kind):  # PyTorch raises where this kernel cannot run
            return attend(q, k, v)

    return lambda: Built(run, 1.0)


def _packaged(module: str) -> Callable[[], Built]:
    def build() -> Built:
        function = importlib.import_module(module).flash_attn_func

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = function(*(t.transpose(1, 2) for t in (q, k, v)))  # (B, N, H, D), as our inputs lie in memory
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return Built(run, 1.0)

    return build
