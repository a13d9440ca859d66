"""One attention call, measured: dense attention of a few of its rows, exactly, beside what a method kept and gave."""

from __future__ import annotations

import math

import torch

from attn_plugins.measures import Shares
from attn_plugins.method import AttentionCall, Processor
from attn_plugins.metrics.recall import attention_rows, row_shares, spread
from attn_plugins.sequence import Sequence


def measured(call: AttentionCall, out: torch.Tensor, processor: Processor, most: int) -> Shares | None:
    """The shares of up to `most` query rows of each head of a call that gave `out`; None if no row is real, or not all
    keys are at hand."""
    rows = _real_rows(call)
    if not len(rows) or "behind" in call.extras:  # of the earlier keys, only what the method kept is left
        return None
    rows = rows[spread(len(rows), most)]
    at = rows.to(call.q.device)
    kept = processor.kept(call, rows)
    shown, bias = dense_view(call, at)
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    group = call.q.shape[1] // call.k.shape[1]
    found, some, moved, whole = [], False, 0.0, 0.0
    for b in range(call.q.shape[0]):
        for h in range(call.q.shape[1]):
            sees = _of(shown, b, h)
            weights, dense = attention_rows(
                call.q[b, h, at], call.k[b, h // group], call.v[b, h // group], sees, scale,
                bias=None if bias is None else _of(bias, b, h), softcap=call.softcap,
                sink=None if call.sinks is None else call.sinks[h],
            )  # fmt: skip
            real = sees.any(-1)
            some = some or bool(real.any())
            given = out[b, h, at][real].to(dense.dtype)
            moved += float((given - dense[real]).abs().sum(dtype=torch.float64))
            whole += float(dense[real].abs().sum(dtype=torch.float64))
            if kept is not None:
                of_head = row_shares(weights, sees, kept.unit_of, _of(kept.chosen, b, h))
                columns = (of_head.recall, of_head.oracle, of_head.kept, of_head.shown)
                found.append(torch.stack(columns)[:, real])
    if not some:
        return None
    drift = moved / whole if whole else (math.inf if moved else 0.0)
    if kept is None:
        return Shares(None, None, None, drift)
    of_all = torch.cat(found, dim=1)
    recall, oracle = of_all[:2].mean(-1).tolist()
    pairs, dense_pairs = of_all[2:].sum(-1).tolist()
    return Shares(recall, oracle, pairs / dense_pairs, drift)


def _real_rows(call: AttentionCall) -> torch.Tensor:
    """The query rows that are asked for and are no padding in some item, as far as the host knows."""
    rows = torch.arange(call.q.shape[2])
    if call.asks is not None:
        rows = rows[call.asks]
    if call.kind in ("self", "joint") and call.sequence is not None:
        rows = rows[real_tokens(call.sequence)[:, rows].any(0)]
    return rows


def dense_view(call: AttentionCall, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What dense attention shows query rows (R,): (B or 1, H or 1, R, N_kv) bool; a mask of numbers, alike, or None."""
    device, keys = call.q.device, call.k.shape[2]
    shown = torch.ones(1, 1, len(rows), keys, dtype=torch.bool, device=device)
    if call.kind in ("self", "joint") and call.sequence is not None and call.sequence.padded:
        real = real_tokens(call.sequence).to(device)[:, None]
        shown = real[:, :, rows, None] & real[:, :, None]
    if call.causal:
        column = torch.arange(keys, device=device)[None]
        position = rows[None] + (keys - call.q.shape[2])
        if call.keys is not None:
            column, position = call.keys.positions, call.keys.first[:, None] + rows
        back = position[:, :, None] - column[:, None]
        seen = (back >= 0) & (column >= 0)[:, None] & (position >= 0)[:, :, None]
        if call.sliding_window is not None:
            seen &= back < call.sliding_window
        shown = shown & seen[:, None]
    if call.mask is None:
        return shown, None
    mask = call.mask[(None,) * (4 - call.mask.ndim)].expand(-1, -1, call.q.shape[2], -1)[:, :, rows]
    return (shown & mask, None) if mask.dtype == torch.bool else (shown, mask)


def real_tokens(sequence: Sequence) -> torch.Tensor:
    """(batch or 1, N) bool: which tokens are no padding."""
    real = torch.ones(sequence.batch or 1, sequence.length, dtype=torch.bool)
    for index, row in enumerate(real):
        for segment in sequence.item(index).segments:
            assert isinstance(segment.valid, int)  # an item's are
            row[segment.start + segment.valid : segment.start + segment.length] = False
    return real


def _of(t: torch.Tensor, item: int, head: int) -> torch.Tensor:
    """One head's part of (B or 1, H or 1, ...)."""
    return t[item if t.shape[0] > 1 else 0, head if t.shape[1] > 1 else 0]
