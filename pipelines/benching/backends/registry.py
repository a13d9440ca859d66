"""The backends that are measured, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attn_plugins.ops import block_sparse_attention
from attn_plugins.pipelines.benching.backends import flash_attention, natten, sdpa
from attn_plugins.pipelines.benching.sides import Built, Cannot, Setting

if TYPE_CHECKING:
    from attn_plugins.pipelines.benching.masks.mask import Mask

Build = Callable[["Mask", Setting, tuple[torch.Tensor, ...]], Built]
NATTEN_ON_A_CPU = 4096  # tokens: there it makes all N x N scores


@dataclass(frozen=True)
class Backend:
    """An implementation. `build` raises where it cannot do a mask, `Cannot` with the reason or whatever it comes to.

    `lazy`: its index is made by its first call.
    """

    title: str
    build: Build
    role: str = "peer"
    lazy: bool = False


def _flex(mask: Mask, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> Built:
    if not mask.plain:
        raise Cannot("another function than masked attention")
    return mask.resolved(leaves).flex(setting, leaves)


def _natten(mask: Mask, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> Built:
    rule = getattr(mask, "window_rule", None)
    if rule is None:
        raise Cannot("windows on a grid only")
    if setting.device.type == "cpu" and mask.shape.tokens > NATTEN_ON_A_CPU:
        raise Cannot("on a CPU it makes all N x N scores")
    return natten.build(rule.grid, rule.window, rule.stride)


def _plan(mask: Mask, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> Built:
    if not mask.plain:
        raise Cannot("another function than masked attention: see ours_operator")
    plan = mask.resolved(leaves).plan(setting, leaves)
    return Built(functools.partial(block_sparse_attention, plan=plan, backend=setting.backend), plan.density)  # type: ignore[arg-type]


def _operator(mask: Mask, setting: Setting, leaves: tuple[torch.Tensor, ...]) -> Built:
    return mask.operator(setting, leaves)


BACKENDS: dict[str, Backend] = {
    **{name: Backend(f"SDPA, {name[5:]} kernel", functools.partial(sdpa.kernel, name)) for name in sdpa.KERNELS},
    "sdpa_mask": Backend("SDPA with a mask tensor", sdpa.with_tensor),
    "sdpa_documents": Backend("SDPA, a call for each document", sdpa.by_document),
    "flex": Backend("flex attention, compiled", _flex),
    **{name: Backend(name, functools.partial(flash_attention.build, name)) for name in flash_attention.MODULES},
    "natten": Backend("NATTEN", _natten),
    "ours_plan": Backend("ours, over a block plan", _plan, "ours", lazy=True),
    "ours_operator": Backend("ours, the mask's own operator", _operator, "ours", lazy=True),
}


def named(names: Iterable[str]) -> list[str]:
    """The names, checked; all of them for none.

    Raises:
        ValueError: an unknown one; the message lists the legal ones.
    """
    found = list(names)
    for name in found:
        if name not in BACKENDS:
            raise ValueError(f"backend {name!r}: legal are {', '.join(BACKENDS)}")
    return found or list(BACKENDS)
