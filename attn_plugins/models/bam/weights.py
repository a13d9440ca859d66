"""What every model of mixtures has before an architecture's own class: how new weights begin, what experts run on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import initialization

from attn_plugins.models.bam.attention import ExpertOutput
from attn_plugins.models.bam.feed_forward import BamExperts
from attn_plugins.models.bam.router import BamRouter


class BamWeights(nn.Module):
    """Before models with and without a head: the new weights' start, and what their experts run on."""

    config: Any

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        std = self.config.initializer_range
        if isinstance(module, BamRouter):
            initialization.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, BamExperts):
            for name, weight in module.named_parameters(recurse=False):
                if name.endswith("_bias"):
                    initialization.zeros_(weight)
                else:
                    initialization.normal_(weight, mean=0.0, std=std)
        elif isinstance(module, ExpertOutput) and module.bias is not None:
            initialization.zeros_(module.bias)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for a decorator in the source; it stands in feed_forward.py
