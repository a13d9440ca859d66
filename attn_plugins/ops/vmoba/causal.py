"""MoBA (arXiv 2502.13189): mixture of block attention over what has been said so far, for a whole text at once."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from attn_plugins.ops.checks import check_qkv, choose_backend, kernel_refusal, resolve_scale
from attn_plugins.ops.vmoba import triton
from attn_plugins.ops.vmoba.choice import block_scores
from attn_plugins.ops.vmoba.layout import decode, encode
from attn_plugins.ops.vmoba.rows_op import attend_rows
from attn_plugins.ops.vmoba.selection import ranked
from attn_plugins.ops.vmoba.tables import own_blocks
from attn_plugins.sequence import Sequence


def causal_block_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, block: int, k_blocks: int, scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """Each query sees its own block up to itself, and the `k_blocks - 1` earlier blocks that score best with it.

    Args:
        q: (B, H, N, D); k, v: (B, H_kv, N, D): a whole text.
        block: tokens of a block; the last may be shorter.
        k_blocks: blocks that a query sees, its own counted.
        scale: of the scores; None is D ** -0.5.
        backend: "auto" ("triton" on CUDA and ROCm, else "cpu"), "triton" or "cpu", as of `vmoba_attention`.

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
    chosen = choose_backend(backend, q.device, kernels=True, refusal=kernel_refusal(q))
    selected = _choice(q.detach(), k.detach(), spec, k_blocks, chosen)
    return attend_rows(q, k, v, selected, resolve_scale(scale, q.shape[-1]), spec, causal=True, backend=chosen)[0]


@torch.library.custom_op(
    "attn_plugins::moba_tokens",
    mutates_args=(),
    schema="(Tensor q, Tensor k, SymInt[] spec, SymInt k_blocks, str backend) -> Tensor",
)
def _choice(q: torch.Tensor, k: torch.Tensor, spec: Rows[int], k_blocks: int, backend: str) -> torch.Tensor:
    one = decode(spec)[0][1]
    if backend == "triton":
        found = triton.best_blocks(q, k, one, min(int(k_blocks), one.count), causal=True)
        if found is not None:
            return found
    own = own_blocks(one, True, q.device)
    scores = block_scores(q, k, one, True, backend)
    later = torch.arange(one.count, device=q.device) > own[:, None]
    order = ranked(scores.masked_fill(later, float("-inf")), own)[..., : min(int(k_blocks), one.count)]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True) & ~later


@_choice.register_fake
def _(q, k, spec, k_blocks, backend):  # type: ignore[no-untyped-def]
    block = spec[2]
    return q.new_empty(*q.shape[:3], (q.shape[2] + block - 1) // block, dtype=torch.bool)
