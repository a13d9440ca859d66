"""`neighborhood_attention`: generalized neighborhood attention over 1-D, 2-D and 3-D grids, with text."""

from __future__ import annotations

import functools
from collections.abc import Sequence as Rows

import torch

from attn_plugins.ops.block_sparse.op import register_sparse_op
from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.ops.checks import check_qkv, check_sequence, choose_backend, kernel_refusal, resolve_scale
from attn_plugins.ops.heads import attend_by_head
from attn_plugins.ops.neighborhood.heads import HeadSetting, head_settings
from attn_plugins.ops.neighborhood.reference import neighborhood_mask
from attn_plugins.ops.neighborhood.spec import encode, plans_of
from attn_plugins.ops.spans.op import attend_spans
from attn_plugins.plan.windows import axis_windows
from attn_plugins.sequence import Sequence

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
    sequence = check_sequence(q, k, grid, text_before, text_after)
    factor = resolve_scale(scale, q.shape[-1])
    chosen = choose_backend(backend, q.device, kernels=True, refusal=kernel_refusal(q))
    settings = head_settings(sequence.grid, q.shape[1], window, stride, dilation, causal)
    attend = functools.partial(_attend, sequence=sequence, scale=factor, backend=chosen)
    out, lse = attend_by_head(q, k, v, settings, attend)
    return (out, lse) if return_lse else out


def _attend(q, k, v, setting: HeadSetting, sequence: Sequence, scale: float, backend: str):  # type: ignore[no-untyped-def]
    if backend == "cpu" and _is_span(sequence, setting):
        window = sequence.tokens if setting.window[0] == -1 else setting.window[0]
        return attend_spans(q, k, v, None, [window] * q.shape[1], 0, 1, scale)
    if backend != "reference":
        return _op(q, k, v, scale, encode(sequence, setting), backend)
    axes = axis_windows(sequence.grid, setting.window, setting.stride, setting.dilation, setting.causal)
    masks = [neighborhood_mask(sequence.item(b), axes)[None] for b in range(sequence.batch or 1)]
    return masked_attention(q, k, v, torch.stack(masks).to(q.device), scale)


def _is_span(sequence: Sequence, setting: HeadSetting) -> bool:
    """Whether a (legal) setting is a causal span over a text: that has a form of its own, with fewer masks."""
    window, *others = setting
    if others != [(1,), (1,), (True,)] or sequence.length != sequence.tokens:
        return False
    return window[0] == -1 or 1 <= window[0] <= sequence.tokens
