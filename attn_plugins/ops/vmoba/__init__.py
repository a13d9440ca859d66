"""`vmoba_attention`: mixture of block attention for video (arXiv 2506.23858), blocks chosen by content."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from attn_plugins.ops.checks import check_qkv, check_sequence, choose_backend, kernel_refusal, resolve_scale
from attn_plugins.ops.vmoba.choice import choose_for_tiles, choose_for_tokens
from attn_plugins.ops.vmoba.layout import decode, encode, fit_block, fit_tile
from attn_plugins.ops.vmoba.lists import attend_lists
from attn_plugins.ops.vmoba.reference import vmoba_reference
from attn_plugins.ops.vmoba.rows_op import attend_rows
from attn_plugins.ops.vmoba.selection import Selection


def vmoba_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    rule: str = "topk",
    scope: str = "query",
    k_blocks: int | None = None,
    tau: float | None = None,
    exact: bool = False,
    tile: int | tuple[int, ...] | None = None,
    min_blocks: int = 1,
    max_blocks: int | None = None,
    text_before: int | torch.Tensor | Rows[Rows[int]] = 0,
    text_after: int | torch.Tensor | Rows[Rows[int]] = 0,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of a grid's queries to the blocks of keys that score best with them (arXiv 2506.23858).

    The keys are cut into blocks, whose mean keys times a query are its scores (in at least float32, unscaled). A query
    keeps its own block, and others by `rule` and `scope`. The choice has no gradient; the attention's are right.

    Args:
        q: (B, H, N, D), any strides; N = text_before + prod(grid) + text_after, the grid in raster order.
        k, v: (B, H_kv, N, D); H is a multiple of H_kv.
        grid: 1 to 3 sizes, outermost axis first.
        block: tokens per axis, one size or one per axis; -1 is the whole axis. The last of an axis may be shorter.
        rule: "topk": the `k_blocks` best. "threshold": the fewest whose min-max normalised scores reach `tau` of the
            total. "top_p": the same with the softmax of the scaled scores.
        scope: "query": for each query. "head": over all pairs of a head and batch item (the paper's "global"); "topk"
            then ranks `k_blocks` times as many pairs as there are queries.
        k_blocks: blocks kept, the own one counted.
        tau: share of the total, the own block's share counted first; 1 and more keeps all.
        exact: choose for each query, as published. Otherwise for each tile of queries, by their mean.
        tile: tokens of a query tile: a number it shall not exceed (None: 1536), or one size per axis. Tiles lie within
            blocks. Not read with `exact`.
        min_blocks, max_blocks: bounds on the blocks that a query keeps; None is no bound.
        text_before, text_after: tokens that see everything and are seen by all: a length, or (B, 2) rows of
            [length, valid]. Padding is seen by none and gives 0. A tensor on a device is read back (a sync).
        scale: of the scores of attention; None is D ** -0.5.
        backend: "auto" ("triton" on CUDA and ROCm, else "cpu"), "triton" (float16, bfloat16, float32; head sizes up to
            256), "cpu" (plain PyTorch on any device; there it reads the choice back), "reference" (dense, by
            definition).
        return_lse: also return the log-sum-exp, (B, H, N), natural log; its gradient is right.

    Returns:
        (B, H, N, D) in q's memory layout.

    Raises:
        ValueError, TypeError: an illegal setting (named by value), or tensors that do not fit it.
    """
    check_qkv(q, k, v)
    sequence = check_sequence(q, k, grid, text_before, text_after)
    how = Selection(rule, scope, k_blocks, tau, min_blocks, max_blocks)
    sizes = fit_block(sequence.grid, block)
    spec = encode(sequence, sizes, fit_tile(sizes, tile))
    factor = resolve_scale(scale, q.shape[-1])
    chosen = choose_backend(backend, q.device, kernels=True, refusal=kernel_refusal(q))
    if chosen == "reference":
        out, lse = vmoba_reference(q, k, v, decode(spec), how, exact, factor)
    elif exact:
        out, lse = attend_rows(
            q, k, v, choose_for_tokens(q, k, spec, how, factor, chosen), factor, spec, backend=chosen
        )
    else:
        out, lse = attend_lists(q, k, v, *choose_for_tiles(q, k, spec, how, factor, chosen), factor, spec, chosen)
    return (out, lse) if return_lse else out
