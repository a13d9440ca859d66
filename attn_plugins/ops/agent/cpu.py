"""The CPU backend: each step is one call of PyTorch's flash kernel, a bias its mask, never expanded.

The kernel has no gradient for a mask: where a bias wants one, the backward is matrix products over a few rows at a
time. Plain PyTorch: it runs on any device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from attn_plugins.ops.agent.steps import Gradients
from attn_plugins.ops.block_sparse import tile_attention

# PyTorch's kernel takes fewer than MANY_ROWS rows in slices of SLICE, each of which reads all keys again: where they
# are cut, from a core's own cache (a fifth less time at 4,096 keys, in float32 and bfloat16, on Sapphire Rapids).
MANY_ROWS, SLICE, CUT_KEYS = 768, 64, 1024
CHUNK_BYTES = 1 << 24  # of scores at once, where a bias wants its gradient


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    values: torch.Tensor | None = None,
    shortcut: float = 0.0,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `steps.Backend` says; the output has any layout."""
    if SLICE <= q.shape[2] < k.shape[2] and _reads_slowly(q.dtype):
        k, v = k.contiguous(), v.contiguous()
    if q.shape[1] == k.shape[1]:
        cuts = k.shape[2] // CUT_KEYS if bias is None and q.shape[2] < MANY_ROWS else 1
        out, lse = _attend_cut(q, k, v, scale, cuts) if cuts > 1 else tile_attention.attend(q, k, v, bias, scale)
    else:
        found = [tile_attention.attend(*_grouped(b, q, k, v, bias), scale) for b in range(q.shape[0])]
        out, lse = (torch.stack(parts).flatten(1, 2) for parts in zip(*found, strict=True))
    if values is not None:
        out.add_(_repeated(values, q), alpha=shortcut)
    return (out if into is None else into.copy_(out)), lse


@functools.cache
def _reads_slowly(dtype: torch.dtype) -> bool:
    """Whether keys should lie side by side for few rows, each small slice of which reads all of them.

    In half precision, unless the kernel packs them anyway, as it does for AMX (1.0 of the time in float32, .9 in
    bfloat16, .77 in float16, copies included; 256 rows, 4,096 keys).
    """
    packs = dtype == torch.bfloat16 and getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return dtype.itemsize == 2 and not packs


def _attend_cut(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, cuts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A few rows over many keys: as views of so many equal cuts, whose results are merged, and of what is left over."""
    size = k.shape[2] // cuts
    rest = size * cuts
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for b, (rows, keys, values) in enumerate(zip(q, k, v, strict=True)):
        cut_keys, cut_values = (t[:, :rest].unflatten(1, (cuts, size)) for t in (keys, values))
        outs, lses = tile_attention.attend(rows[:, None].expand(-1, cuts, -1, -1), cut_keys, cut_values, None, scale)
        parts, part_lses = [*outs.unbind(1)], [*lses.unbind(1)]
        if rest < keys.shape[1]:
            last = tile_attention.attend(rows[None], keys[None, :, rest:], values[None, :, rest:], None, scale)
            parts.append(last[0][0])
            part_lses.append(last[1][0])
        out[b], lse[b] = _merged(parts, part_lses)
    return out, lse


def _merged(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`merge_attention_states` of parts that all have keys: in place, in few passes."""
    stacked = torch.stack(lses)
    lse = torch.logsumexp(stacked, dim=0)
    first, *weights = stacked.sub_(lse).exp_()[..., None]
    merged = outs[0] * first
    for out, weight in zip(outs[1:], weights, strict=True):
        merged.addcmul_(out.to(merged.dtype), weight)
    return merged, lse


def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    wants_bias: bool,
    values: torch.Tensor | None = None,
    shortcut: float = 0.0,
) -> Gradients:
    """As `steps.Backend` says."""
    if wants_bias and bias is not None:
        return _backward_with_bias(grad, q, k, v, bias, scale, lse.dtype)
    if values is not None:
        out = out.sub(_repeated(values, q), alpha=shortcut)
    if q.shape[1] == k.shape[1]:
        return *tile_attention.attend_backward(grad, None, q, k, v, out, lse, bias, scale), None
    found = []
    for b in range(q.shape[0]):
        tile_q, tile_k, tile_v, tile_bias = _grouped(b, q, k, v, bias)
        tile_grad, tile_out, tile_lse = (t[b].unflatten(0, tile_q.shape[:2]) for t in (grad, out, lse))
        dq, dk, dv = tile_attention.attend_backward(
            tile_grad, None, tile_q, tile_k, tile_v, tile_out, tile_lse, tile_bias, scale
        )
        found.append((dq.flatten(0, 1), dk.sum(1), dv.sum(1)))
    return *(torch.stack(parts) for parts in zip(*found, strict=True)), None  # type: ignore[return-value]


def _backward_with_bias(grad, q, k, v, bias, scale, wide) -> Gradients:  # type: ignore[no-untyped-def]
    grad_q = torch.empty_like(q)
    grad_k, grad_v, grad_bias = (torch.zeros_like(t, dtype=wide) for t in (k, v, bias))
    group = q.shape[1] // k.shape[1]
    for b, kv, rows in _pieces(q, k, wide):
        heads = slice(kv.start * group, kv.stop * group)
        keys, vals = (t[b, kv].to(wide).repeat_interleave(group, dim=0) for t in (k, v))
        queries, grads = (t[b, heads, rows].to(wide) for t in (q, grad))
        cut = _cut(bias, b, heads, rows)
        p = torch.softmax((scale * queries) @ keys.transpose(-1, -2) + bias[cut], dim=-1)
        grad_p = grads @ vals.transpose(-1, -2)
        grad_scores = p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
        grad_bias[cut] += grad_scores.sum_to_size(grad_bias[cut].shape)
        grad_q[b, heads, rows] = (scale * grad_scores @ keys).to(q.dtype)
        grad_k[b, kv] += (scale * grad_scores.transpose(-1, -2) @ queries).unflatten(0, (-1, group)).sum(1)
        grad_v[b, kv] += (p.transpose(-1, -2) @ grads).unflatten(0, (-1, group)).sum(1)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias.to(bias.dtype)


def _pieces(q: torch.Tensor, k: torch.Tensor, wide: torch.dtype) -> Iterator[tuple[int, slice, slice]]:
    """(batch item, KV heads, query rows) whose scores stay small, in one fixed order."""
    group, row_bytes = q.shape[1] // k.shape[1], k.shape[2] * wide.itemsize
    heads = min(k.shape[1], max(1, CHUNK_BYTES // (row_bytes * group * q.shape[2])))
    rows = min(q.shape[2], max(1, CHUNK_BYTES // (row_bytes * group * heads)))
    for b in range(q.shape[0]):
        for head in range(0, k.shape[1], heads):
            for row in range(0, q.shape[2], rows):
                yield b, slice(head, min(head + heads, k.shape[1])), slice(row, row + rows)


def _cut(bias: torch.Tensor, b: int, heads: slice, rows: slice) -> tuple[int, slice, slice]:
    """Where a bias (1 or B, 1 or H, 1 or Nq, ...) holds that piece."""
    whole = slice(None)
    return min(b, bias.shape[0] - 1), heads if bias.shape[1] > 1 else whole, rows if bias.shape[2] > 1 else whole


def _grouped(
    b: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """One batch item with its KV heads as the batch and the query heads of each as heads; keys are views."""
    kv_heads = k.shape[1]
    tile_q = q[b].unflatten(0, (kv_heads, -1))
    tile_k, tile_v = (t[b, :, None].expand(-1, tile_q.shape[1], -1, -1) for t in (k, v))
    if bias is not None:
        bias = bias[b if bias.shape[0] > 1 else 0]
        bias = bias[None] if bias.shape[0] == 1 else bias.unflatten(0, (kv_heads, -1))
    return tile_q, tile_k, tile_v, bias


def _repeated(values: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Values of KV heads, for every query head."""
    return values if values.shape[1] == q.shape[1] else values.repeat_interleave(q.shape[1] // values.shape[1], dim=1)
