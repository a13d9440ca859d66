"""The CPU backend: all references in one pair of matrix products, a slice of positions at a time.

Scores lie with positions last, where they are many, so that every step over heads, rows and tokens is vectorised. All
of it is in at least float32: what is cast is one slice. Plain PyTorch: it runs on any device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from attn_plugins.ops.weighted_merge.weights import merge_weights

SLICE_BYTES = 4 << 20  # of scores at a time: what a cache holds, and all that is needed beside the result


def weights(
    q: torch.Tensor,
    phrase_k: torch.Tensor,
    phrase_lengths: torch.Tensor,
    masks: torch.Tensor | None,
    scale: float,
    temperature: float,
    null_bias: float | None,
) -> torch.Tensor:
    """w (B, R, S)."""
    return merge_weights(relevance(q, phrase_k, phrase_lengths, scale), temperature, masks, null_bias)


def relevance(q: torch.Tensor, phrase_k: torch.Tensor, phrase_lengths: torch.Tensor, scale: float) -> torch.Tensor:
    """log(S r), (B, R, S): log-sum-exps over positions, then over heads and rows.

    Beside an even spread, and with the highest score taken off first, so that what is added up stays near 0: float32
    would lose digits of large scores and of log S.
    """
    batch, heads, positions, _ = q.shape
    references, rows = phrase_k.shape[1], phrase_k.shape[3]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = phrase_k.to(wide).transpose(1, 2).flatten(2, 3) * scale  # (1 or B, H, R L, D)
    unreal = torch.arange(rows, device=q.device) >= phrase_lengths[..., None]
    count = heads * phrase_lengths.clamp_min(1).to(wide)
    out = q.new_empty(batch, references, positions, dtype=wide)
    if not out.numel():
        return out
    step = max(1, SLICE_BYTES // max(1, references * rows * positions * out.element_size()))  # heads at a time
    for item in range(batch):
        some = min(item, len(keys) - 1)
        hidden = unreal[min(item, len(unreal) - 1), :, :, None]
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for first in range(0, heads, step):
            scores = keys[some, first : first + step] @ q[item, first : first + step].to(wide).transpose(-1, -2)
            scores -= scores.amax(-1, keepdim=True)
            scores -= scores.exp().mean(-1, keepdim=True).log_()
            scores = scores.unflatten(1, (references, rows)).masked_fill_(hidden, -math.inf)
            top = scores.amax((0, 2))
            steady = top.masked_fill(top == -math.inf, 0.0)  # of a phrase without rows
            parts.append((steady, (scores - steady[:, None]).exp_().sum((0, 2))))
        highest = parts[0][0] if len(parts) == 1 else torch.stack([top for top, _ in parts]).amax(0)
        total = sum(amount * (top - highest).exp() for top, amount in parts)
        out[item] = highest + (total / count[min(item, len(count) - 1), :, None]).log()
    return out


def forward(
    q: torch.Tensor,
    text_out: torch.Tensor,
    image_k: torch.Tensor,
    image_v: torch.Tensor,
    strengths: torch.Tensor,
    image_lengths: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """text_out + sum_i strengths_i Z_i, in q's memory layout."""
    keys, values, hidden = _tokens(image_k, image_v, image_lengths, scale)
    out = torch.empty_like(q)
    for item, rows in _slices(q, image_k):
        shares = _shares(q[item, :, rows], keys[item], hidden, item, image_k.shape[1])
        shares *= strengths[item, None, :, None, rows]
        merged = shares.flatten(1, 2).transpose(-1, -2) @ values[item]
        merged += text_out[item, :, rows]
        out[item, :, rows] = merged
    return out


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    image_k: torch.Tensor,
    image_v: torch.Tensor,
    strengths: torch.Tensor,
    image_lengths: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, image_k, image_v and strengths; scores are computed again. text_out's is `grad` itself."""
    keys, values, hidden = _tokens(image_k, image_v, image_lengths, scale)
    references = image_k.shape[1]
    grad_q, grad_strengths = torch.empty_like(q), torch.empty_like(strengths)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    for item, rows in _slices(q, image_k):
        queries, up = (t[item, :, rows].to(keys.dtype) for t in (q, grad))
        shares = _shares(queries, keys[item], hidden, item, references)  # (H, R, T, s)
        amount = strengths[item, None, :, None, rows]
        told = (values[item] @ up.transpose(-1, -2)).unflatten(1, (references, -1))  # d out / d (share * strength)
        grad_values[item] += (shares * amount).flatten(1, 2) @ up
        both = shares * told
        grad_strengths[item, :, rows] = both.sum((0, 2))
        grad_scores = ((both - shares * both.sum(2, keepdim=True)) * amount).flatten(1, 2)
        grad_q[item, :, rows] = grad_scores.transpose(-1, -2) @ keys[item]
        grad_keys[item] += grad_scores @ queries
    grad_keys *= scale
    tokens = [t.unflatten(2, (references, -1)).transpose(1, 2) for t in (grad_keys, grad_values)]
    if hidden is not None:
        tokens = [t.masked_fill(hidden[:, :, None, :, None], 0.0) for t in tokens]
    grad_k, grad_v = (torch.empty_like(like).copy_(t) for like, t in zip((image_k, image_v), tokens, strict=True))
    return grad_q, grad_k, grad_v, grad_strengths


def _tokens(
    image_k: torch.Tensor, image_v: torch.Tensor, image_lengths: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys times scale and values (B, H, R T, D) in at least float32, and which are no tokens (1 or B, R, T)."""
    wide = torch.promote_types(image_k.dtype, torch.float32)
    keys, values = image_k.to(wide), image_v.to(wide)
    hidden = None
    if image_lengths is not None:
        hidden = torch.arange(image_k.shape[3], device=image_k.device) >= image_lengths[..., None]
        # whatever stands there, nan times a share of 0 is nan
        keys, values = (t.masked_fill(hidden[:, :, None, :, None], 0.0) for t in (keys, values))
    keys, values = (t.transpose(1, 2).flatten(2, 3) for t in (keys, values))
    return keys * scale, values, hidden


def _shares(
    queries: torch.Tensor, keys: torch.Tensor, hidden: torch.Tensor | None, item: int, references: int
) -> torch.Tensor:
    """A softmax over the tokens of each reference, (H, R, T, s), of queries (H, s, D) and keys (H, R T, D)."""
    scores = (keys @ queries.to(keys.dtype).transpose(-1, -2)).unflatten(1, (references, -1))
    if hidden is not None:
        unreal = hidden[min(item, len(hidden) - 1), :, :, None]
        scores.masked_fill_(unreal, torch.finfo(scores.dtype).min)  # no -inf: a reference may have no token
    return torch.softmax(scores, dim=2)


def _slices(q: torch.Tensor, image_k: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Batch items, each in slices of positions of about SLICE_BYTES of scores."""
    batch, heads, positions, _ = q.shape
    if not q.numel():
        return
    row = heads * image_k.shape[1] * image_k.shape[3] * max(4, q.element_size())
    step = max(1, SLICE_BYTES // row)
    step = -(-positions // max(1, -(-positions // step)))  # equal slices
    for item in range(batch):
        for first in range(0, positions, step):
            yield item, slice(first, first + step)
