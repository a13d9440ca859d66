"""PyTorch's attention as a backend: each of its kernels, one with a mask tensor, and a call for each document."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_plugins.pipelines.benching.sides import Built, Cannot, Setting

if TYPE_CHECKING:
    from attn_plugins.pipelines.benching.masks.mask import Mask

KERNELS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
ON_A_CPU = ("sdpa_flash", "sdpa_math")
MOST_BYTES = 2 << 30  # of scores or of a mask: what is larger is left out
SLICES, KEYS = ((768, 256), (192, 64), (0, 32)), 512  # ATen's flash kernel on a CPU: queries and keys at a time

Leaves = tuple[torch.Tensor, ...]


def kernel(name: str, mask: Mask, setting: Setting, leaves: Leaves) -> Built:
    """One kernel, forced: full and causal attention, which is all that the options say."""
    if not mask.plain:
        raise Cannot("another function than masked attention")
    if mask.told is None or mask.told.documents or mask.told.window != (-1, -1):
        raise Cannot("its only option is causal")
    return forced(name, mask.told.causal, setting, leaves)


def forced(name: str, causal: bool, setting: Setting, leaves: Leaves) -> Built:
    q, k = leaves[:2]
    if setting.device.type == "cpu" and name not in ON_A_CPU:
        raise Cannot("not on a CPU")
    if name == "sdpa_math":
        _fits("scores", q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size())
    gqa = q.shape[1] != k.shape[1]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(KERNELS[name]):  # PyTorch raises where this kernel cannot run
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

    return Built(run, _executed(name, q.shape[2], causal, setting))


def with_tensor(mask: Mask, setting: Setting, leaves: Leaves) -> Built:
    """The mask as a bool tensor (1, H or 1, N, N), by the kernel that PyTorch chooses."""
    if not mask.plain:
        raise Cannot("another function than masked attention")
    q, k = leaves[:2]
    n, mask = q.shape[2], mask.resolved(leaves)
    own = q.shape[1] if mask.by_head else 1
    _fits("the mask", own * n * n * q.element_size())
    seen = torch.empty(1, own, n, n, dtype=torch.bool, device=q.device)
    for rows in torch.arange(n, device=q.device).split(1024):
        seen[0, :, rows] = mask.rows(torch.arange(own, device=q.device), rows)
    gqa = q.shape[1] != k.shape[1]
    return Built(lambda q, k, v, *rest: F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=gqa), 1.0)


def by_document(mask: Mask, setting: Setting, leaves: Leaves) -> Built:
    """A call for each document, by the kernel that PyTorch chooses, and the results side by side."""
    if mask.told is None or not mask.told.documents:
        raise Cannot("no documents that do not see each other")
    lengths, causal = list(mask.told.documents), mask.told.causal
    gqa = leaves[0].shape[1] != leaves[1].shape[1]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        parts = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), v.split(lengths, dim=2), strict=True)
        found = [F.scaled_dot_product_attention(a, b, c, is_causal=causal, enable_gqa=gqa) for a, b, c in parts]
        return torch.cat(found, dim=2)

    name = "sdpa_flash" if setting.device.type == "cpu" else "-"
    shares = [_executed(name, n, causal, setting) * n * n for n in lengths]
    return Built(run, -1.0 if min(shares) < 0 else sum(shares) / sum(lengths) ** 2)


def _executed(name: str, n: int, causal: bool, setting: Setting) -> float:
    """Share of the pairs that a kernel computes; -1 where it does not say."""
    if not causal or name == "sdpa_math":
        return 1.0
    if setting.device.type != "cpu":
        return -1.0
    height = next(height for least, height in SLICES if n >= least)
    ends = [min(-(-min(row + height, n) // KEYS) * KEYS, n) for row in range(0, n, height)]
    return sum(end * min(height, n - row) for end, row in zip(ends, range(0, n, height), strict=True)) / n**2


def _fits(what: str, size: int) -> None:
    if size > MOST_BYTES:
        raise Cannot(f"{what} would take {size / 2**30:.1f} GiB")
