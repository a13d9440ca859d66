"""MoBA (arXiv 2502.13189): mixture of block attention over what has been said so far, for a whole text at once."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from attn_plugins.ops.checks import check_qkv, resolve_scale
from attn_plugins.ops.vmoba.gate import gate_scores, pool
from attn_plugins.ops.vmoba.layout import decode, encode
from attn_plugins.ops.vmoba.rows_op import attend_rows
from attn_plugins.ops.vmoba.selection import ranked
from attn_plugins.sequence import Sequence


def causal_block_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, block: int, k_blocks: int, scale: float | None = None
) -> torch.Tensor:
    """Each query sees its own block up to itself, and the `k_blocks - 1` earlier blocks that score best with it.

    Args:
        q: (B, H, N, D); k, v: (B, H_kv, N, D): a whole text.
        block: tokens of a block; the last may be shorter.
        k_blocks: blocks that a query sees, its own counted.
        scale: of the scores; None is D ** -0.5.

    Returns:
        (B, H, N, D) in q's memory layout, with gradients; the choice of blocks has none.

    Raises:
        ValueError, TypeError: tensors that do not go together, or numbers below 1.
    """
    check_qkv(q, k, v)
    if q.shape[2] != k.shape[2] or block < 1 or k_blocks < 1:
        raise ValueError(
            f"{q.shape[2]} queries, {k.shape[2]} keys, block={block}, k_blocks={k_blocks}: as many, and 1 or more"
        )
    tokens, size = q.shape[2], min(block, q.shape[2])
    spec = encode(Sequence((tokens,)), (size,), (size,))
    selected = _choice(q.detach(), k.detach(), spec, k_blocks)
    return attend_rows(q, k, v, selected, resolve_scale(scale, q.shape[-1]), spec, causal=True)[0]


@torch.library.custom_op(
    "attn_plugins::moba_tokens",
    mutates_args=(),
    schema="(Tensor q, Tensor k, SymInt[] spec, SymInt k_blocks) -> Tensor",
)
def _choice(q: torch.Tensor, k: torch.Tensor, spec: Rows[int], k_blocks: int) -> torch.Tensor:
    one = decode(spec)[0][1]
    own = one.own[one.tile_of].to(q.device)
    with torch.autocast(q.device.type, enabled=False):
        scores = gate_scores(q.to(torch.promote_types(q.dtype, torch.float32)), pool(k, one.blocks))
    later = torch.arange(one.count, device=q.device) > own[:, None]
    order = ranked(scores.masked_fill(later, float("-inf")), own)[..., : min(int(k_blocks), one.count)]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True) & ~later


@_choice.register_fake
def _(q, k, spec, k_blocks):  # type: ignore[no-untyped-def]
    block = spec[2]
    return q.new_empty(*q.shape[:3], (q.shape[2] + block - 1) // block, dtype=torch.bool)
