"""Attention whose heads have gates, under whatever a call brings: padding, a cache, the model's own window."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from attn_plugins.method import AttentionCall
from attn_plugins.methods.gna_causal import CausalRule
from attn_plugins.methods.gna_causal_tiles import Score, attention, plain_keys, tiled
from attn_plugins.ops.routed_heads import routed_head_attention
from attn_plugins.sequence import Sequence

WHOLE = CausalRule(-1, 1, 1)


def attend(
    call: AttentionCall, gates: torch.Tensor | None, *, skip: bool, dense_backward: bool = False, backend: str = "auto"
) -> torch.Tensor:
    """(B, H, N, D): each head's attention times its gate; padding gives 0 where it is skipped.

    Args:
        gates: (B, N, H); None: all are 1.
        skip: heads whose gate is 0 are not computed. Where the operator has no argument for what the call brings, and
            for single tokens behind a cache, all heads are computed, and multiplied.
        dense_backward: gates that are 0 get a gradient too.
    """
    real = real_tokens(call)
    if gates is not None and skip:
        routed = functools.partial(
            routed_head_attention, causal=call.causal, scale=call.scale, dense_backward=dense_backward, backend=backend
        )
        if not call.causal:
            lengths = None if real is None else real.sum(-1)
            return routed(call.q, call.k, call.v, _masked(gates, real), lengths=lengths)
        queries, plain = call.q.shape[2], _as_shapes_tell(call)
        if plain and call.keys is None and queries > 1:
            return routed(call.q, call.k, call.v, gates)
        if plain and real is not None and queries == call.k.shape[2] > 1:
            order = (~real).to(torch.uint8).argsort(dim=-1, stable=True)  # real tokens first, in their order
            q, k, v = (_taken(t, order) for t in (call.q, call.k, call.v))
            moved = _masked(gates, real).gather(1, order[..., None].expand_as(gates))
            return _taken(routed(q, k, v, moved, lengths=real.sum(-1)), order.argsort(dim=-1))
    out = _dense(call, real)
    return out if gates is None else out * gates.transpose(1, 2)[..., None].to(out.dtype)


def real_tokens(call: AttentionCall) -> torch.Tensor | None:
    """Which rows of q are no padding, (B, N) bool; None: all."""
    if call.keys is not None:
        column = call.keys.column.reshape(1) + torch.arange(call.q.shape[2], device=call.q.device)
        return call.keys.positions.index_select(1, column) >= 0
    sequence = call.sequence
    if call.causal or sequence is None or not sequence.padded:
        return None
    return _valid(sequence, call.q.shape[0], call.q.device)


def _valid(sequence: Sequence, batch: int, device: torch.device) -> torch.Tensor:
    ends = [_end(sequence.item(index)) for index in range(batch)]
    return torch.arange(sequence.length, device=device) < torch.tensor(ends, device=device)[:, None]


def _end(item: Sequence) -> int:
    assert isinstance(item.valid_after, int)  # an item's is
    return item.text_before + item.tokens + item.valid_after


def _as_shapes_tell(call: AttentionCall) -> bool:
    """Plain causal attention, but for padding."""
    limit = call.sliding_window
    return call.softcap is None and call.sinks is None and (limit is None or call.k.shape[2] <= limit)


def _dense(call: AttentionCall, real: torch.Tensor | None) -> torch.Tensor:
    q, k, v = call.q, call.k, call.v
    grouped = q.shape[1] != k.shape[1]
    if not call.causal:
        mask = None if real is None else real[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, mask, scale=call.scale, enable_gqa=grouped)
    if call.keys is None and _as_shapes_tell(call):
        if q.shape[2] == 1:
            return attention(q, k, v, None, Score(call.scale))
        if q.shape[2] == k.shape[2]:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=call.scale, enable_gqa=grouped)
    score = Score(call.scale, call.softcap, call.sinks)
    return tiled(q, k, v, call.keys or plain_keys(q, k), WHOLE.within(k.shape[2], call.sliding_window), score)


def _masked(gates: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    return gates if real is None else gates.masked_fill(~real[..., None], 0.0)


def _taken(t: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) with its tokens in another order (B, N) in each item."""
    return t.gather(2, order[:, None, :, None].expand_as(t))
