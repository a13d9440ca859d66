"""MoBA: mixture of block attention for language models (arXiv 2502.13189), in the prefill.

A text is cut into blocks; a query `q` sees its own block up to itself, and of the earlier blocks `j` those of the best
scores `<mean of the keys in j, q>`. The choice is made for every query, as published.

Deviations: steps behind a cache (decoding, chunks of a prompt) stay dense, and so do texts so short that all blocks are
seen; where the published code leaves the first or last layers dense, give `layers=...`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from attn_plugins.method import AttentionCall, Kept, Method, MethodConfig, Processor, SiteKind
from attn_plugins.ops.checks import choose_backend, kernel_refusal
from attn_plugins.ops.vmoba.causal import causal_block_attention
from attn_plugins.ops.vmoba.layout import encode
from attn_plugins.sequence import Sequence


@dataclass(frozen=True)
class MoBAConfig(MethodConfig):
    """Blocks of a text, and how many of them a query sees.

    Args:
        block: tokens of a block.
        k_blocks: blocks that a query sees, its own counted.
    """

    block: int = 512
    k_blocks: int = 3

    def __post_init__(self) -> None:
        for name in ("block", "k_blocks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: give 1 or more")


class MoBAProcessor(Processor):
    """MoBA where all queries of a text come at once, dense attention elsewhere."""

    def __init__(self, config: MoBAConfig) -> None:
        self.config = config

    def refuses(self, call: AttentionCall) -> str | None:
        if not call.causal:
            return "this attention is not causal"
        return super().refuses(call)

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        queries, keys = call.q.shape[2], call.k.shape[2]
        if self._is_sparse(call):
            return causal_block_attention(
                call.q, call.k, call.v, block=self.config.block, k_blocks=self.config.k_blocks, scale=call.scale
            )
        mask = None
        if 1 < queries < keys:
            at = torch.arange(keys, device=call.q.device)
            mask = at <= at[keys - queries :, None]
        return F.scaled_dot_product_attention(
            call.q, call.k, call.v, mask, is_causal=queries == keys, scale=call.scale,
            enable_gqa=call.q.shape[1] != call.k.shape[1],
        )  # fmt: skip

    def _is_sparse(self, call: AttentionCall) -> bool:
        return call.q.shape[2] == call.k.shape[2] > self.config.block * self.config.k_blocks

    def kept(self, call: AttentionCall, rows: torch.Tensor) -> Kept:
        keys, block = call.k.shape[2], self.config.block
        block_of = torch.arange(keys, device=call.q.device) // block
        if self._is_sparse(call):
            spec = encode(Sequence((keys,)), (block,), (block,))
            choose = torch.ops.attn_plugins.moba_tokens  # what causal_block_attention chooses by
            backend = choose_backend("auto", call.q.device, kernels=True, refusal=kernel_refusal(call.q))
            chosen = choose(call.q.detach(), call.k.detach(), spec, self.config.k_blocks, backend)
            return Kept(block_of, chosen[:, :, rows.to(call.q.device)])
        return Kept(block_of, block_of.new_ones(1, 1, len(rows), -(-keys // block), dtype=torch.bool))

    def density(self, sequence: Sequence) -> float:
        """Share of the dense causal pairs of a prefill."""
        n, block, most = sequence.length, self.config.block, self.config.k_blocks
        seen = sum(min(i // block, most - 1) * block + i % block + 1 for i in range(n))
        return 2 * seen / (n * (n + 1))


class MoBA(Method):
    name = "moba"
    title = "Mixture of block attention for language models"
    kind = "sparse"
    paper = "arXiv 2502.13189"
    config_class = MoBAConfig
    sites = frozenset({"causal"})
    own_settings = frozenset({"block", "k_blocks"})

    def ladder(self, kind: SiteKind, grid: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
        block = max(grid[0] // 16, 64)
        return {"block": block, "k_blocks": 8}, {"block": block, "k_blocks": 4}

    def processor(
        self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind = "causal"
    ) -> Processor | None:
        assert isinstance(config, MoBAConfig)  # patching makes it with config_class
        return _processor(config)


@functools.lru_cache(maxsize=64)
def _processor(config: MoBAConfig) -> Processor:
    return MoBAProcessor(config)
