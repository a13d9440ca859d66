"""VMoBA by its definition (arXiv 2506.23858): gate, choice, mask, softmax, row by row. Slow and plain.

A row is a token, or a tile of them that has the mean of its queries. Float64 in and float64 out.
"""

from __future__ import annotations

import torch

from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.ops.vmoba.layout import Layout
from attn_plugins.ops.vmoba.selection import Selection


def vmoba_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, parts: list[tuple[slice, Layout]], how: Selection,
    exact: bool, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """q (B, H, N, D), k and v (B, H_kv, N, D) to (output, LSE), each batch item with its layout."""
    layouts = [one for items, one in parts for _ in range(*items.indices(q.shape[0]))]
    masks = [vmoba_mask(q[b], k[b], one, how, exact, scale) for b, one in enumerate(layouts)]
    return masked_attention(q, k, v, torch.stack(masks), scale)


def vmoba_mask(
    q: torch.Tensor, k: torch.Tensor, one: Layout, how: Selection, exact: bool, scale: float
) -> torch.Tensor:
    """(H, N, N) bool of one batch item: q (H, N, D), k (H_kv, N, D)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    sequence, heads = one.sequence, q.shape[0]
    first, last = sequence.text_before, sequence.text_before + sequence.tokens
    block_of = one.own[one.tile_of].to(q.device)  # (tokens,)
    row_of = torch.arange(sequence.tokens, device=q.device) if exact else one.tile_of.to(q.device)
    rows = int(row_of.max()) + 1
    real = torch.zeros(sequence.length, dtype=torch.bool, device=q.device)
    real[first:last] = True
    for start, length in one.text:
        real[start : start + length] = True
    mask = real[:, None] & real & torch.ones(heads, 1, 1, dtype=torch.bool, device=q.device)
    for h in range(heads):
        keys = k[h // (heads // k.shape[0]), first:last].detach().to(wide)
        queries = q[h, first:last].detach().to(wide)
        means = torch.stack([keys[block_of == j].mean(0) for j in range(one.count)])
        scores = torch.stack([queries[row_of == r].mean(0) for r in range(rows)]) @ means.T
        own = torch.tensor([int(block_of[row_of == r][0]) for r in range(rows)])
        chosen = _clamped(scores, own, _choose(scores, own, how, scale), how)
        mask[h, first:last, first:last] = chosen.to(q.device)[row_of][:, block_of]
    return mask


def _choose(scores: torch.Tensor, own: torch.Tensor, how: Selection, scale: float) -> torch.Tensor:
    """(rows, blocks) bool by rule and scope, the own block always in it."""
    rows, blocks = scores.shape
    if how.tau is not None and how.rule != "topk" and how.tau >= 1:
        return torch.ones(rows, blocks, dtype=torch.bool)
    chosen = torch.zeros(rows, blocks, dtype=torch.bool)
    chosen[torch.arange(rows), own] = True
    scopes = [[r] for r in range(rows)] if how.scope == "query" else [list(range(rows))]
    for members in scopes:
        values = scores[members]
        if how.rule == "threshold":
            low, high = values.min(), values.max()
            weights = (values - low) / (high - low) if high > low else torch.ones_like(values)
        else:
            weights = torch.softmax((values * scale).flatten(), 0).view_as(values)
        others = [(i, j) for i, r in enumerate(members) for j in range(blocks) if j != own[r]]
        others.sort(key=lambda pair: -float(values[pair]))  # a stable sort: ties stay in order
        if how.rule == "topk":
            assert how.k_blocks is not None
            number = (min(how.k_blocks, blocks) - 1) * len(members)
        else:
            assert how.tau is not None
            reached = sum(float(weights[i, own[r]]) for i, r in enumerate(members))
            number = 0
            while reached < how.tau * float(weights.sum()) and number < len(others):
                reached += float(weights[others[number]])
                number += 1
        for i, j in others[:number]:
            chosen[members[i], j] = True
    return chosen


def _clamped(scores: torch.Tensor, own: torch.Tensor, chosen: torch.Tensor, how: Selection) -> torch.Tensor:
    """`min_blocks` and `max_blocks` of each row: the best are added, the worst dropped, the own one stays."""
    blocks = scores.shape[1]
    for r in range(len(chosen)):
        ranks = sorted((j for j in range(blocks) if j != own[r]), key=lambda j: -float(scores[r, j]))
        number = max(int(chosen[r].sum()), how.min_blocks)
        number = min(number, how.max_blocks or number, blocks)
        chosen[r] = False
        chosen[r, [int(own[r]), *ranks[: number - 1]]] = True
    return chosen
