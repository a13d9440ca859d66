"""MIP as a method: the weighted merge in every cross-attention layer that an IP-Adapter is loaded into."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from attn_plugins.method import AttentionCall, Method, MethodConfig, Processor, SiteKind
from attn_plugins.methods.mip.checkpoint import read_text_weights
from attn_plugins.methods.mip.config import MIPConfig
from attn_plugins.ops import weighted_merge
from attn_plugins.ops.weighted_merge import text_gate
from attn_plugins.references import ReferenceProcessor, References
from attn_plugins.sequence import Sequence


@dataclass(eq=False)
class MIPProcessor(ReferenceProcessor):
    """`ops.weighted_merge` of what a layer knows of its references."""

    config: MIPConfig

    def __post_init__(self) -> None:
        self.phrases, self.photos = self.config.phrases, self.config.images
        self.trains = self.config.train

    def text_weights(self, widths: list[int]) -> list[torch.Tensor] | None:
        path = self.config.checkpoint
        if not isinstance(path, tuple):
            return None if path is None else read_text_weights(path, widths)
        zeros = [torch.zeros(width) for width in widths]  # of a plain adapter: its t is 1
        each = [zeros if one is None else read_text_weights(one, widths) for one in path]
        return [torch.stack([row.float() for row in rows]) for rows in zip(*each, strict=True)]

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        given, config = References.of(call), self.config
        out, weights = weighted_merge(
            call.q, given.text_out, given.phrase_k, given.phrase_lengths, given.image_k, given.image_v,
            image_lengths=given.image_lengths,
            scales=tuple(a * b for a, b in zip(given.scales, config.strengths, strict=True)),
            text_weight=given.text_weight, temperature=config.temperature, masks=given.masks,
            null_bias=config.null_bias, scale=call.scale, phrase_q=given.phrase_q, return_weights=True,
            backend=config.backend,
        )  # fmt: skip
        if call.watch is not None:
            if call.watch.gated and given.text_weight is not None:
                weights = weights * text_gate(given.text_out, given.text_weight)
            call.watch.take(weights, call.sequence)
        return out

    def density(self, sequence: Sequence) -> float:
        return 1.0


class MIP(Method):
    name = "mip"
    title = "MIP: weighted merge of several reference images"
    kind = "operator"
    paper = "arXiv 2409.17920"
    config_class = MIPConfig
    sites = frozenset({"cross"})
    needs_references = True

    def processor(
        self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind = "cross"
    ) -> Processor | None:
        assert isinstance(config, MIPConfig)  # patching makes it with config_class
        return _processor(config)


@functools.lru_cache(maxsize=64)
def _processor(config: MIPConfig) -> Processor:
    """One object for equal settings: a compiled model needs a graph for each distinct one."""
    return MIPProcessor(config)
