"""transformers' DiNAT without NATTEN: its two unfused operators, which NATTEN removed in 0.20.

`transformers.models.dinat` imports `natten2dqkrpb` and `natten2dav` (arXiv 2209.15001), so DiNAT checkpoints load
with no NATTEN of today, and with none at all on CPU. `provide()` puts ours there:

    undo = attn_plugins.patches.natten.provide()
    model = AutoModelForImageClassification.from_pretrained("shi-labs/dinat-mini-in1k-224")
    undo()      # models made in between need the operators as long as they run
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attn_plugins.ops.neighborhood_scores import neighborhood_aggregate, neighborhood_scores

MODELING = "transformers.models.dinat.modeling_dinat"
NAMES = ("natten2dqkrpb", "natten2dav")


def natten2dqkrpb(
    query: torch.Tensor, key: torch.Tensor, rpb: torch.Tensor | None, kernel_size: int, dilation: int = 1
) -> torch.Tensor:
    """Scores of each query's kernel_size x kernel_size window, plus a relative position bias.

    Args:
        query, key: (B, heads, H, W, D); the query is already scaled.
        rpb: (heads, 2 * kernel_size - 1, 2 * kernel_size - 1), indexed by `i_kv - i_q + kernel_size - 1` on each axis,
            counted within the dilation class; or None.
        kernel_size: odd, kernel_size * dilation <= min(H, W). The window is shifted inward at the borders.

    Returns:
        (B, heads, H, W, kernel_size ** 2), differentiable in query, key and rpb.

    Raises:
        ValueError: an even kernel_size, or shapes that do not belong together.
    """
    _check_kernel(kernel_size)
    return neighborhood_scores(query, key, window=kernel_size, dilation=dilation, bias=rpb)


def natten2dav(attn: torch.Tensor, value: torch.Tensor, kernel_size: int, dilation: int = 1) -> torch.Tensor:
    """The sum of each query's window of values, weighted by attn.

    Args:
        attn: (B, heads, H, W, kernel_size ** 2); cast to the dtype of value (autocast keeps a softmax in float32).
        value: (B, heads, H, W, D).
        kernel_size, dilation: as in `natten2dqkrpb`.

    Returns:
        (B, heads, H, W, D), differentiable in both.

    Raises:
        ValueError: an even kernel_size, or shapes that do not belong together.
    """
    _check_kernel(kernel_size)
    return neighborhood_aggregate(attn.to(value.dtype), value, window=kernel_size, dilation=dilation)


def provide(*, replace: bool = False) -> Callable[[], None]:
    """Make transformers' DiNAT run on the operators of this module; returns what undoes it.

    Only names inside `transformers.models.dinat.modeling_dinat` change. Some releases of transformers (5.23 is one)
    hand over queries as (B, W, H, heads, D), on which no NATTEN could run: that is noticed and put right.

    Args:
        replace: take the place of a NATTEN that still has these operators. By default such a NATTEN is left alone, and
            nothing changes.

    Raises:
        ImportError: transformers is not installed or has no DiNAT.
        RuntimeError: its attention hands over queries in an order that is neither of the two.
    """
    modeling = _import_modeling()
    current = [getattr(modeling, name) for name in NAMES]
    if any(getattr(function, "_attn_plugins", False) for function in current):
        return lambda: None
    if not replace and all(function.__module__.partition(".")[0] == "natten" for function in current):
        return lambda: None

    before = {name: getattr(modeling, name) for name in (*NAMES, "requires_backends")}
    required = modeling.requires_backends

    def requires_backends(obj: object, backends: Any) -> None:
        names = backends if isinstance(backends, (list, tuple)) else [backends]
        required(obj, [name for name in names if name != "natten"])

    modeling.requires_backends = requires_backends
    try:
        operators = _in_order(_order_of_axes(modeling))
    except BaseException:
        modeling.requires_backends = required
        raise
    for name, operator in zip(NAMES, operators, strict=True):
        operator._attn_plugins = True  # type: ignore[attr-defined]
        setattr(modeling, name, operator)

    def undo() -> None:
        for name, value in before.items():
            setattr(modeling, name, value)

    return undo


def _in_order(order: tuple[int, ...]) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """The two operators for q, k, v whose axes `order` brings to (B, heads, H, W, D)."""

    def scores(query, key, rpb, kernel_size, dilation=1):  # type: ignore[no-untyped-def]
        return natten2dqkrpb(query.permute(order), key.permute(order), rpb, kernel_size, dilation)

    def values(attn, value, kernel_size, dilation=1):  # type: ignore[no-untyped-def]
        return natten2dav(attn, value.permute(order), kernel_size, dilation)

    return scores, values


def _order_of_axes(modeling: Any) -> tuple[int, ...]:
    """Run one attention layer on meta tensors whose sizes are all different, and look at what it hands over."""
    heads, height, width, depth = 2, 3, 5, 4
    seen: list[tuple[int, ...]] = []

    def look(query: torch.Tensor, *_: Any) -> torch.Tensor:
        seen.append(tuple(query.shape))
        raise _Seen

    original = modeling.natten2dqkrpb
    modeling.natten2dqkrpb = look
    try:
        with torch.device("meta"), contextlib.suppress(_Seen):
            layer = modeling.NeighborhoodAttention(modeling.DinatConfig(), heads * depth, heads, 3, 1)
            layer(torch.empty(1, height, width, heads * depth))
    finally:
        modeling.natten2dqkrpb = original
    wanted = (1, heads, height, width, depth)
    if not seen or sorted(seen[0]) != sorted(wanted):
        raise RuntimeError(
            f"{MODELING} hands over queries of shape {seen[0] if seen else None} where {wanted} or a permutation of it "
            "was expected: this release of transformers is not supported"
        )
    return tuple(seen[0].index(size) for size in wanted)


class _Seen(Exception):
    pass


def _import_modeling() -> Any:
    with _old_names_in_natten():
        return importlib.import_module(MODELING)


@contextlib.contextmanager
def _old_names_in_natten() -> Iterator[None]:
    """While modeling_dinat is being imported: an installed NATTEN >= 0.20 without the names would stop it."""
    if MODELING in sys.modules:
        yield
        return
    added: list[str] = []
    functional: Any = None
    with contextlib.suppress(ImportError):
        functional = importlib.import_module("natten.functional")
        for name in NAMES:
            if not hasattr(functional, name):
                setattr(functional, name, _removed)
                added.append(name)
    try:
        yield
    finally:
        for name in added:
            delattr(functional, name)


def _removed(*_: Any, **__: Any) -> torch.Tensor:
    raise ImportError("NATTEN has these operators no more: call attn_plugins.patches.natten.provide()")


def _check_kernel(kernel_size: int) -> None:
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}: these operators are defined for odd sizes, 3, 5, 7, ...")
