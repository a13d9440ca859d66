"""What a mixture is, beside the dense model that it came from: parameters, cache, operations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from attn_plugins.models.bam.architectures import heads_of

CONTEXT = 4096  # tokens, of the operations


@dataclass(frozen=True)
class UpcycleReport:
    """Counts. flops: multiplications and additions for one token that has `context` tokens before it.

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
        return [
            f"{self.model_type}: {len(self.experts)} experts ({experts}), method {self.method}, "
            f"attention {self.attention}",
            f"{self.routed_tensors} of {self.tensors} tensors routed, {self.dtype}",
            f"parameters {self.parameters:,}, for one token {self.parameters_active:,} "
            f"(dense {self.parameters_dense:,})",
            f"KV cache {self.kv_bytes:,} bytes a token (dense {self.kv_bytes_dense:,})",
            f"FLOPs a token, {self.context:,} tokens before it: {self.flops / 1e9:.3f} G, "
            f"{self.flops / self.flops_dense:.2f} x dense",
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
    cache = 2 * layers * kv_heads * head_dim * dtype.itemsize
    scores = 4 * layers * heads * head_dim * CONTEXT  # q k and p v, for one attention
    one_table = (
        config.vocab_size * config.hidden_size if not config.tie_word_embeddings else 0
    )  # looked up, not multiplied
    return UpcycleReport(
        config.model_type, method, config.attention_experts, tuple(names), str(dtype).removeprefix("torch."),
        len(shapes), routed, total, active, dense,
        cache * (experts if config.attention_experts == "all_params" else 1), cache, CONTEXT,
        2 * (active - one_table) + scores * (1 if config.attention_experts == "mean" else experts),
        2 * (dense - one_table) + scores,
    )  # fmt: skip


def _count(shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
