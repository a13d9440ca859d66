"""`neighborhood_attention`: generalized neighborhood attention over 1-D, 2-D and 3-D grids, with text."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from attn_plugins.ops.block_sparse.op import register_sparse_op
from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.ops.checks import check_qkv, choose_backend, kernel_refusal, resolve_scale
from attn_plugins.ops.neighborhood.heads import HeadGroup, group_heads, kv_heads_of
from attn_plugins.ops.neighborhood.reference import neighborhood_mask
from attn_plugins.ops.neighborhood.spec import encode, plans_of
from attn_plugins.ops.spans.op import attend_spans
from attn_plugins.plan.windows import axis_windows
from attn_plugins.sequence import Sequence, text_lengths

PerAxis = int | tuple[int, ...] | list[tuple[int, ...]]

_op = register_sparse_op("neighborhood", plans_of)


def neighborhood_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    grid: int | tuple[int, ...],
    window: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    causal: bool | tuple[bool, ...] | list[tuple[bool, ...]] = False,
    text_before: int | torch.Tensor | Rows[Rows[int]] = 0,
    text_after: int | torch.Tensor | Rows[Rows[int]] = 0,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Generalized neighborhood attention (arXiv 2504.16922, section 3; stride 1 is 2403.04690's).

    Args:
        q: (B, H, N, D), any strides; N = text_before + prod(grid) + text_after, the grid in raster order.
        k, v: (B, H_kv, N, D); H is a multiple of H_kv.
        grid: 1 to 3 sizes, outermost axis first.
        window, stride, dilation, causal: one value, or a tuple (one per axis), or a *list* of tuples (one per query
            head). 1 <= stride <= window, window * dilation <= size; a window of -1 is the whole axis.
        text_before, text_after: tokens that see everything and are seen by all: a length, or (B, 2) rows of
            [length, valid]. Padding is seen by none and gives 0. A tensor on a device is read back (a sync).
        scale: of the scores; None is D ** -0.5.
        backend: "auto" ("triton" on CUDA and ROCm, else "cpu"), "triton" (float16, bfloat16, float32; head sizes up to
            256), "cpu" (plain PyTorch on any device), "reference" (dense, by definition).
        return_lse: also return the log-sum-exp, (B, H, N), natural log; its gradient is right.

    Returns:
        (B, H, N, D) in q's memory layout.

    Raises:
        ValueError, TypeError: an illegal setting (named by axis and value), or tensors that do not fit it.
    """
    check_qkv(q, k, v)
    before, valid_before = text_lengths("text_before", text_before)
    after, valid_after = text_lengths("text_after", text_after)
    sequence = Sequence(grid, before, after, valid_before, valid_after)  # type: ignore[arg-type]
    if not q.shape[2] == k.shape[2] == sequence.length:
        raise ValueError(
            f"q has {q.shape[2]} tokens, k {k.shape[2]}; text_before {before} + grid {sequence.grid} "
            f"({sequence.tokens}) + text_after {after} makes {sequence.length}"
        )
    for valid in (valid_before, valid_after):  # here, not in Sequence: it makes one int of rows that are all alike
        if isinstance(valid, tuple) and len(valid) != q.shape[0]:
            raise ValueError(f"valid text lengths for {len(valid)} batch items, but the batch has {q.shape[0]}")
    factor = resolve_scale(scale, q.shape[-1])
    chosen = choose_backend(backend, q.device, kernels=True, refusal=kernel_refusal(q))
    groups = group_heads(sequence.grid, q.shape[1], window, stride, dilation, causal)
    if len(groups) == 1:
        out, lse = _attend(q, k, v, sequence, groups[0], factor, chosen)
    else:
        out, lse = _per_group(q, k, v, sequence, groups, factor, chosen)
    return (out, lse) if return_lse else out


def _attend(q, k, v, sequence: Sequence, group: HeadGroup, scale: float, backend: str):  # type: ignore[no-untyped-def]
    if backend == "cpu" and _is_span(sequence, group):
        window = sequence.tokens if group.window[0] == -1 else group.window[0]
        return attend_spans(q, k, v, None, [window] * q.shape[1], 0, 1, scale)
    if backend != "reference":
        return _op(q, k, v, scale, encode(sequence, group), backend)
    axes = axis_windows(sequence.grid, group.window, group.stride, group.dilation, group.causal)
    masks = [neighborhood_mask(sequence.item(b), axes)[None] for b in range(sequence.batch or 1)]
    return masked_attention(q, k, v, torch.stack(masks).to(q.device), scale)


def _is_span(sequence: Sequence, group: HeadGroup) -> bool:
    """Whether a (legal) setting is a causal span over a text: that has a form of its own, with fewer masks."""
    if group.causal != (True,) or not group.stride == group.dilation == (1,) or sequence.length != sequence.tokens:
        return False
    return group.window[0] == -1 or 1 <= group.window[0] <= sequence.tokens


def _per_group(q, k, v, sequence, groups: list[HeadGroup], scale: float, backend: str):  # type: ignore[no-untyped-def]
    """Heads of one setting together; each group is a problem of its own."""
    order: list[int] = []
    outs, lses = [], []
    for group in groups:
        heads = torch.tensor(group.heads, device=q.device)
        kv = torch.tensor(kv_heads_of(group.heads, q.shape[1], k.shape[1]), device=q.device)
        out, lse = _attend(q[:, heads], k[:, kv], v[:, kv], sequence, group, scale, backend)
        order += group.heads
        outs.append(out)
        lses.append(lse)
    back = torch.tensor([order.index(h) for h in range(q.shape[1])], device=q.device)
    out = torch.cat(outs, dim=1)[:, back]
    return torch.empty_like(q).copy_(out), torch.cat(lses, dim=1)[:, back]
