"""What a mixture is, beside the dense model that it came from: parameters, cache, operations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from attn_plugins.models.bam.architectures import heads_of, of

CONTEXT = 4096  # tokens, of the operations
_PLACES = "vit.embeddings.position_embeddings"  # (1, tokens, C)
_ADDED = (_PLACES, "vit.embeddings.cls_token")


@dataclass(frozen=True)
class UpcycleReport:
    """Counts. flops: multiplications and additions for one token that has `context` tokens before it; of a picture
    classifier, which has no cache, for one of a picture's `context` tokens.

    routed_tensors: of the mixture, those in which every expert has a part of its own. active: parameters that one token
    meets (its experts of each feed-forward, and all attention experts: they are mixed softly).
    """

    model_type: str
    method: str
    attention: str
    experts: tuple[str, ...]
    dtype: str
    tensors: int
    routed_tensors: int
    parameters: int
    parameters_active: int
    parameters_dense: int
    kv_bytes: int
    kv_bytes_dense: int
    context: int
    flops: int
    flops_dense: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        experts = ", ".join(self.experts)
        cache = f"KV cache {self.kv_bytes:,} bytes a token (dense {self.kv_bytes_dense:,})"
        where = f"{self.context:,} tokens before it" if self.kv_bytes else f"of a picture's {self.context:,}"
        return [
            f"{self.model_type}: {len(self.experts)} experts ({experts}), method {self.method}, "
            f"attention {self.attention}",
            f"{self.routed_tensors} of {self.tensors} tensors routed, {self.dtype}",
            f"parameters {self.parameters:,}, for one token {self.parameters_active:,} "
            f"(dense {self.parameters_dense:,})",
            *([cache] if self.kv_bytes else []),
            f"FLOPs a token, {where}: {self.flops / 1e9:.3f} G, {self.flops / self.flops_dense:.2f} x dense",
        ]


def report(
    config: Any,
    shapes: Mapping[str, Sequence[int]],
    dense_shapes: Mapping[str, Sequence[int]],
    routed: int,
    names: Sequence[str],
    method: str,
    dtype: torch.dtype,
) -> UpcycleReport:
    """shapes, dense_shapes: of all tensors of the mixture and of one expert, ties counted once."""
    layers, (heads, kv_heads, head_dim) = config.num_hidden_layers, heads_of(config)
    experts = config.num_experts
    total, dense = _count(shapes), _count(dense_shapes)
    in_experts = sum(math.prod(shape) for name, shape in shapes.items() if ".mlp.experts." in name)
    active = total - in_experts * (experts - config.num_experts_per_tok) // experts
    vision = of(config.model_type).vision
    context = dense_shapes[_PLACES][1] if vision else CONTEXT
    cache = 0 if vision else 2 * layers * kv_heads * head_dim * dtype.itemsize
    scores = 4 * layers * heads * head_dim * context  # q k and p v, for one attention
    beside = _beside(config, dense_shapes, vision)
    return UpcycleReport(
        config.model_type, method, config.attention_experts, tuple(names), str(dtype).removeprefix("torch."),
        len(shapes), routed, total, active, dense,
        cache * (experts if config.attention_experts == "all_params" else 1), cache, context,
        2 * (active - beside) + scores * (1 if config.attention_experts == "mean" else experts),
        2 * (dense - beside) + scores,
    )  # fmt: skip


def _beside(config: Any, shapes: Mapping[str, Sequence[int]], vision: bool) -> int:
    """Parameters that no token is multiplied by: a table that is looked up, what is added, a head for one token."""
    if vision:
        return sum(math.prod(shapes[name]) for name in shapes if name.startswith("classifier.") or name in _ADDED)
    return 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size


def _count(shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
