"""What hiding tokens from causal attention would do to the loss, to first order, in blocks.

Of the output O_i = sum_j A_ij V_j, hiding key j and renormalising the others gives O_i + A_ij / (1 - A_ij) (O_i - V_j).
So the loss changes by E_ij = -A_ij / (1 - A_ij) (G_ij - sum_n A_in G_in), where G_ij = dL/dO_i . V_j is the gradient of
A_ij, and the sum is dL/dO_i . O_i (MoA, arXiv 2406.14909, section 4.2, equation 3).

Hiding a set of keys S at once gives sum_{j not in S} A_ij V_j / sum_{j not in S} A_ij. `window_influence` is of the
sets that windows hide: what the pairs of a row do, which cancels in the output, is added before its size is taken.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

WORKSPACE = {"cpu": 1 << 20, "other": 1 << 25}  # elements of a strip's weights: what a cache holds, what fills a GPU
Strip = tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]


def block_influence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    *,
    scale: float | None = None,
    block: int = 64,
    workspace: int | None = None,
) -> torch.Tensor:
    """Sums of |E_ij| over blocks of `block` x `block` pairs, exact, from one strip of rows at a time.

    Args:
        q, grad_out: (H, N, D): the queries, and the gradient of the loss with respect to attention's output.
        k, v: (H_kv, N, D); H is a multiple of H_kv.
        scale: of the scores; None is D ** -0.5.
        block: tokens. The last block may be a part of one.
        workspace: elements that the weights of a strip may take, of which there are a few copies; a strip is at least
            one block high. None is what suits the device.

    Returns:
        (H, n, n), n = ceil(N / block), at least float32: [h, a, b] is of the queries in block a and the keys in b, 0
        for b > a. The one key of the first query cannot be hidden: its pair counts as 0.

    Raises:
        ValueError: shapes that do not go together.
    """
    blocks = -(-q.shape[1] // block)
    found = grad_out.new_zeros(q.shape[0], blocks, blocks, dtype=_wide(q))
    for start, end, weights, change, scores in _strips(q, k, v, grad_out, scale, block, workspace):
        # of a row's heaviest key: its weight may be 1 but for rounding, so its quotient is made of the others' softmax
        first = scores.argmax(-1, keepdim=True)
        weight = weights.gather(-1, first)
        others = scores.scatter_(-1, first, float("-inf")).softmax(-1)
        heaviest = (others.unsqueeze(-2) @ change.unsqueeze(-1)).squeeze(-1)
        change.sub_((1 - weight) * heaviest).mul_(weights).div_(1 - weights.scatter(-1, first, 0.0))
        change.scatter_(-1, first, weight * heaviest).abs_()
        if start == 0:
            change[:, 0] = 0
        rows, keys = slice(start // block, -(-end // block)), slice(-(-end // block))
        found[:, rows, keys] = _row_sums(_key_sums(change, block), block)
    return found


def window_influence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    *,
    sink: int = 1,
    scale: float | None = None,
    block: int = 64,
    workspace: int | None = None,
) -> torch.Tensor:
    """As `block_influence`, but exact for windows: what each next block adds when all blocks before it are hidden too.

    A query's change when blocks sink..b are hidden is taken as a whole, with its renormalisation, then its size; [h, a,
    b] is the sum of these sizes over the queries of block a, less that for sink..b - 1. So the sum over the blocks that
    a window hides, `hidden_loss` with the same sink, is the sum over rows of first-order changes. Entries may be
    negative, where hiding more makes up for what was hidden; those of sinks and of the query's own block are 0.

    Args:
        sink: first blocks that no window hides.

    Other arguments, returns and raises: as `block_influence`.
    """
    blocks = -(-q.shape[1] // block)
    found = grad_out.new_zeros(q.shape[0], blocks, blocks, dtype=_wide(q))
    for start, end, weights, change, _ in _strips(q, k, v, grad_out, scale, block, workspace):
        mass, moved = _key_sums(weights, block), _key_sums(change.mul_(weights), block)
        # what stays: blocks behind b, and sinks; summed from the query backwards, so that little weight is not lost
        left = [_behind(sums) + sums[..., :sink].sum(-1, keepdim=True) for sums in (mass, moved)]
        after = left[1] / left[0].clamp_min(torch.finfo(left[0].dtype).tiny)
        each = _row_sums((after - moved.sum(-1, keepdim=True)).abs_(), block)
        rows = torch.arange(start // block, -(-end // block), device=q.device)[:, None]
        keys = torch.arange(each.shape[-1], device=q.device)
        each.masked_fill_((keys < sink) | (keys >= rows), 0.0)
        step = torch.cat([each[..., :1], each.diff(dim=-1)], dim=-1)
        found[:, start // block : -(-end // block), : each.shape[-1]] = step.masked_fill_(keys >= rows, 0.0)
    return found


def _strips(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad_out: torch.Tensor, scale: float | None, block: int,
    workspace: int | None,
) -> Iterator[Strip]:  # fmt: skip
    """(first row, last, weights, G_ij - G_it, scores) of whole blocks of rows: (H, rows, keys up to the last row).

    t is the row's heaviest key: differences from it are exact where it has nearly all the weight.
    """
    heads, tokens, channels = q.shape
    if grad_out.shape != q.shape or k.shape != v.shape or k.shape[1:] != q.shape[1:] or heads % k.shape[0]:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in {"q": q, "k": k, "v": v, "dO": grad_out}.items())
        raise ValueError(f"{shapes}: legal are (H, N, D) of q and dO, (H_kv, N, D) of k and v, H a multiple of H_kv")
    scale = channels**-0.5 if scale is None else scale
    q, k, v, grad_out = (t.detach().to(_wide(q)) for t in (q, k, v, grad_out))
    groups = k.shape[0]
    workspace = workspace or WORKSPACE["cpu" if q.device.type == "cpu" else "other"]
    height = max(workspace // (heads * tokens * block), 1) * block
    for start in range(0, tokens, height):
        end = min(start + height, tokens)
        # (H_kv, heads a group * rows, ...): a group reads its keys once
        rows, gradient = (t[:, start:end].reshape(groups, -1, channels) for t in (q, grad_out))
        scores = (rows @ k[:, :end].mT).mul_(scale).view(heads, end - start, end)
        ahead = torch.ones(end - start, end, dtype=torch.bool, device=q.device).triu_(start + 1)
        weights = scores.masked_fill_(ahead, float("-inf")).softmax(-1)
        change = (gradient @ v[:, :end].mT).view_as(weights)
        yield start, end, weights, change.sub_(change.gather(-1, scores.argmax(-1, keepdim=True))), scores


def _wide(q: torch.Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _behind(sums: torch.Tensor) -> torch.Tensor:
    """(..., n): of each block, the sum over those behind it."""
    return torch.nn.functional.pad(sums.flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))


def _key_sums(pairs: torch.Tensor, block: int) -> torch.Tensor:
    """(H, rows, keys) to (H, rows, blocks of keys), the last a part of one where keys do not go up."""
    more = -pairs.shape[2] % block
    pairs = torch.nn.functional.pad(pairs, (0, more)) if more else pairs
    return pairs.unflatten(2, (-1, block)).sum(-1)


def _row_sums(rows: torch.Tensor, block: int) -> torch.Tensor:
    """(H, rows, n) to (H, blocks of rows, n)."""
    more = -rows.shape[1] % block
    rows = torch.nn.functional.pad(rows, (0, 0, 0, more)) if more else rows
    return rows.unflatten(1, (-1, block)).sum(2)
