"""Neighborhood attention in two halves: the scores of each query's window, and the weighted sum over it.

For models that want the scores in between (a relative position bias, a softmax and a dropout of their own), as the
unfused operators of DiNA do (arXiv 2209.15001). The window is GNA's rule without causality, so every query has exactly
prod(window) keys, in raster order of the window. Queries and keys keep their grid: (B, H, *grid, D).
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch

from attn_plugins.ops.neighborhood_scores import cpu, reference
from attn_plugins.ops.neighborhood_scores.bias import read_bias
from attn_plugins.plan.windows import AxisWindow, axis_windows

__all__ = ["neighborhood_aggregate", "neighborhood_scores"]

Axis = int | Many[int]
BACKENDS = ("auto", "cpu", "reference")


def neighborhood_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    window: Axis,
    stride: Axis = 1,
    dilation: Axis = 1,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> torch.Tensor:
    """`scale * q . k (+ bias)` for the keys of each query's window.

    Args:
        q, k: (B, H, *grid, D), a grid of 1 to 3 axes; the same number of heads.
        window, stride, dilation: one value, or one per axis (see `neighborhood_attention`); -1 is the whole axis.
        bias: (H, 2 * window_0 - 1, ...), one value per head and relative position `i_kv - i_q + window - 1`, counted
            within the dilation class. At stride 1 every relative position fits.
        scale: factor on the scores, before the bias.
        backend: "cpu" (plain PyTorch, any device), "reference" (builds an N x N matrix), "auto".

    Returns:
        (B, H, *grid, prod(window)) in q's dtype. Sums are taken in at least float32. Differentiable twice.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, an illegal window, a bias of another shape,
            a bias with a stride above 1 (where relative positions reach past the table).
    """
    _check_pair(q, k, "q", "k")
    axes = axis_windows(tuple(q.shape[2:-1]), _axis(window), _axis(stride), _axis(dilation))
    if q.shape != k.shape:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)}: both must be (B, H, *grid, D), of one shape")
    q = q * scale if scale != 1.0 else q
    scores = _module(backend).scores(q, k, axes)
    return scores if bias is None else scores + _bias_of(bias, axes, q).to(scores.dtype)


def neighborhood_aggregate(
    weights: torch.Tensor,
    v: torch.Tensor,
    *,
    window: Axis,
    stride: Axis = 1,
    dilation: Axis = 1,
    backend: str = "auto",
) -> torch.Tensor:
    """The sum of each query's window of values, weighted by `weights` as `neighborhood_scores` orders them.

    Args:
        weights: (B, H, *grid, prod(window)).
        v: (B, H, *grid, D).
        window, stride, dilation, backend: as in `neighborhood_scores`.

    Returns:
        (B, H, *grid, D) in v's dtype. Differentiable twice.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, or an illegal window.
    """
    _check_pair(weights, v, "weights", "v")
    axes = axis_windows(tuple(v.shape[2:-1]), _axis(window), _axis(stride), _axis(dilation))
    count = 1
    for axis in axes:
        count *= axis.window
    if tuple(weights.shape) != (*v.shape[:-1], count):
        raise ValueError(
            f"weights {tuple(weights.shape)} for v {tuple(v.shape)} and windows of {count} keys: "
            f"expected {(*v.shape[:-1], count)}"
        )
    return _module(backend).aggregate(weights, v, axes)


def _bias_of(bias: torch.Tensor, axes: tuple[AxisWindow, ...], q: torch.Tensor) -> torch.Tensor:
    """(H, *grid, prod(window)): the table read at every query's relative positions."""
    expected = (q.shape[1], *(2 * axis.window - 1 for axis in axes))
    if tuple(bias.shape) != expected:
        raise ValueError(f"bias {tuple(bias.shape)}: expected (heads, 2 * window - 1 per axis) = {expected}")
    if any(axis.stride > 1 for axis in axes):
        raise ValueError("a relative position bias needs stride 1 on every axis: add yours to the scores instead")
    return read_bias(bias, axes)


def _check_pair(a: torch.Tensor, b: torch.Tensor, name_a: str, name_b: str) -> None:
    if not 4 <= b.dim() <= 6 or a.dim() != b.dim():
        raise ValueError(
            f"{name_a} {tuple(a.shape)}, {name_b} {tuple(b.shape)}: expected (B, H, *grid, D), a grid of 1 to 3 axes"
        )
    if a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            f"{name_a} is {a.dtype} on {a.device}, {name_b} is {b.dtype} on {b.device}: "
            "both must have one dtype and one device"
        )


def _axis(value: Axis) -> int | tuple[int, ...]:
    return value if isinstance(value, int) else tuple(value)


def _module(backend: str):  # type: ignore[no-untyped-def]  # a module; both have scores and aggregate
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: legal are {', '.join(BACKENDS)}")
    return reference if backend == "reference" else cpu
