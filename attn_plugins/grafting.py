"""`patch(model, "bam", experts=[...])`: attention modules replaced whole, with the undo record of any other patch.

BAM is no method of the registry: it takes models, not settings, and computes nothing from the q, k, v of a layer.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attn_plugins import record
from attn_plugins.handle import PatchHandle
from attn_plugins.method import AttentionCall, MethodConfig, Processor
from attn_plugins.record import SITE_ATTRIBUTE, Patched
from attn_plugins.runtime import Layer, RootState
from attn_plugins.schedule import Schedule
from attn_plugins.targets import find

BAM = "bam"
SAVE = "save_pretrained"


@dataclass(frozen=True)
class BamPatchConfig(MethodConfig):
    """Attention experts in a loaded model (docs/bam.md).

    Args:
        experts: what the other models were, a name and a checksum each. They are not held: their weights are copied.
        attention: "all_params", or "shared_kv" for the dense model's cache.
        seed: of the routers.
    """

    experts: tuple[str, ...] = ()
    attention: str = "all_params"
    seed: int = 0


class _Replaced(Processor):
    """For tables: the layer's own module does it all, so that nothing calls this."""

    measure = "cost"

    def __init__(self, config: BamPatchConfig) -> None:
        self.config = config

    def density(self, sequence: Any) -> float:
        return 1.0 + len(self.config.experts)

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        raise NotImplementedError("a layer with attention experts has no call of its own")


class _NotSaved:
    """In the place of a model's `save_pretrained`: what it writes has wide attentions that no class loads."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "save_pretrained: a model with attention experts in it cannot be loaded again; call "
            "attn_plugins.unpatch(model, 'bam') first, or make a mixture that lasts with attn-plugins upcycle"
        )


class _Undo:
    """Takes the experts out; refuses while another patch sits on their modules."""

    def __init__(self, graft: Any, root: nn.Module) -> None:
        self.graft, self.root = graft, root
        vars(root)[SAVE] = _NotSaved()

    def __call__(self) -> None:
        held = [name for layer, name, _ in self.graft.layers if SITE_ATTRIBUTE in getattr(layer, name).__dict__]
        if held:
            raise ValueError("another patch is on the attention experts: take that one out first (the last one first)")
        self.graft.remove()
        vars(self.root).pop(SAVE, None)


def graft(obj: object, experts: Sequence[Any] = (), **options: Any) -> PatchHandle:
    """What `patch` does for "bam"; see `attn_plugins.models.bam.grafting.graft_experts`.

    Raises:
        ValueError: several models, experts that do not fit, layers that another patch holds.
        TypeError: an unknown option.
    """
    from attn_plugins.models.bam.grafting import graft_experts

    target, *others = find(obj)
    if others:
        raise ValueError(f"bam patches one model, and this has {1 + len(others)}: give the language model itself")
    root, family, _ = target
    config: Any = BamPatchConfig.from_options(experts=[_told(expert) for expert in experts], **options)
    state = RootState(Schedule(0, None))
    processor = _Replaced(config)
    sites = family.find_sites(root)
    plan = Patched(BAM, family.name, config, state, [Layer(state, processor, s.kind, s.name, s.index) for s in sites])
    existing = next((row for row in record.patches_of(root) if row.same_as(plan)), None)
    if existing is not None:
        existing.handle = existing.handle or PatchHandle([(root, existing)])
        return existing.handle
    taken = next((row.method for row in record.patches_of(root) if row.method == BAM), None)
    taken = taken or next((record.holder(root, s.name) for s in sites if SITE_ATTRIBUTE in s.module.__dict__), None)
    if taken:
        raise ValueError(
            f"{type(root).__name__} is patched by {taken!r}: call attn_plugins.unpatch(obj, {taken!r}) first"
        )
    plan.undo = [_Undo(graft_experts(root, experts, attention=config.attention, seed=config.seed), root)]
    record.add(root, plan)
    plan.handle = PatchHandle([(root, plan)])
    return plan.handle


def _told(expert: Any) -> str:
    """An expert's name, and a checksum of its weights: patching with equal ones twice is patching once."""
    weights = [weight for weight in expert.parameters() if weight.ndim == 2] if isinstance(expert, nn.Module) else []
    if not weights:
        raise ValueError(f"an expert is a {type(expert).__name__}: give loaded models of the same architecture")
    sums = torch.stack([weight.detach().sum(dtype=torch.float64).cpu() for weight in weights])
    return f"{type(expert).__name__}:{zlib.crc32(sums.numpy().tobytes()):08x}"
