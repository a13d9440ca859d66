"""FlashAttention's own packages, where they are installed: dense, causal, windows, and documents by their lengths."""

from __future__ import annotations

import importlib
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from attn_plugins.pipelines.benching.sides import Built, Cannot, Setting

if TYPE_CHECKING:
    from attn_plugins.pipelines.benching.masks.mask import Mask, Told

MODULES = {"flash_attn": "flash_attn", "flash_attn_3": "flash_attn_interface"}  # both name their functions alike


def build(name: str, mask: Mask, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> Built:
    """The mask in the words of its options.

    Raises:
        Cannot: a mask that its options do not say, or a CPU.
        ImportError: it is not installed.
    """
    if not mask.plain:
        raise Cannot("another function than masked attention")
    if mask.told is None:
        raise Cannot("its options are causal, a window, and documents")
    return attend(name, mask.told, setting, leaves)


def attend(name: str, told: Told, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> Built:
    """Takes (B, N, H, D), as our inputs lie in memory, or (tokens, H, D) with the documents' ends.

    Raises:
        Cannot: a CPU.
        ImportError: it is not installed.
    """
    if setting.device.type == "cpu":
        raise Cannot("not on a CPU")
    module = importlib.import_module(MODULES[name])
    options: dict[str, Any] = {"causal": told.causal, "window_size": told.window}

    def together(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return _output(module.flash_attn_func(*_swapped(q, k, v), **options)).transpose(1, 2)

    if not told.documents:
        return Built(together)
    lengths = told.documents * leaves[0].shape[0]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=setting.device)

    def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        flat = [t.flatten(0, 1) for t in _swapped(q, k, v)]
        out = _output(module.flash_attn_varlen_func(*flat, ends, ends, max(lengths), max(lengths), **options))
        return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)

    return Built(packed)


def _swapped(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def _output(found: Any) -> torch.Tensor:
    return found[0] if isinstance(found, tuple) else found
