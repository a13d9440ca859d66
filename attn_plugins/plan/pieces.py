"""Blocks cut to the step of a GPU kernel: runs of at most so many places.

A kernel takes a fixed number of rows at a time, whatever the blocks of a plan are. Where the host knows the blocks they
are cut exactly, and blocks that overlap are cut at each other's edges too, so that pieces never do. Where they live on
a device nothing is read back: there are as many pieces as there could be, and those that do not exist have size 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True, eq=False)
class Pieces:
    """The pieces of some blocks, by place in the order of tokens.

    Attributes:
        start, size: (P,) int64, the run of places of each piece.
        first: (P,) int64, the token at its first place.
        even: (P,) bool, whether it has `step` places and its tokens are `first + pattern`.
        pattern: (step,) int32, the tokens of an even piece relative to its first; None: they follow each other.
        block: (P,) int64, the block of each piece; for blocks that do not overlap.
        base, number: (K,) int64, block `j` is the pieces `base[j] .. base[j] + number[j]`.
        most: pieces of the block that has most, or a bound.
        single: whether every block is known to be one piece.
        alike: whether all pieces are known to be even.
    """

    start: torch.Tensor
    size: torch.Tensor
    first: torch.Tensor
    even: torch.Tensor
    pattern: torch.Tensor | None
    block: torch.Tensor
    base: torch.Tensor
    number: torch.Tensor
    most: int
    single: bool = False
    alike: bool = False

    def to(self, device: torch.device) -> Pieces:
        held = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: upload(tensor, device) for name, tensor in held.items()})  # type: ignore[arg-type]


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device, without waiting for it."""
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# Dynamic methods make a plan in each call, over blocks that stay: what is derived of the blocks stays with them.
_cut: WeakIdKeyDictionary = WeakIdKeyDictionary()


def cut(
    start: torch.Tensor, size: torch.Tensor, order: torch.Tensor | None, length: int, step: int, device: torch.device
) -> Pieces:
    """The pieces of blocks `(start, size)` over `length` places, on `device`; made once for the same tensors.

    `order`: (length,) the token at each place; None is raster order. Blocks on a device must not overlap.
    """
    kept = _cut.setdefault(start, {})
    key = (id(size), id(order), length, step, device)
    if key not in kept:
        known = start.device.type == size.device.type == "cpu" and (order is None or order.device.type == "cpu")
        made = _cut_known(start, size, order, step) if known else _cut_unknown(start, size, order, length, step, device)
        kept[key] = (made.to(device), size, order)  # holding both keeps their ids from being given to others
    return kept[key][0]


def _cut_known(start: torch.Tensor, size: torch.Tensor, order: torch.Tensor | None, step: int) -> Pieces:
    begin, end = start.long(), start.long() + size.long()
    edges = torch.unique(torch.cat([begin, end]))
    low, high = edges[:-1], edges[1:]
    opened = torch.searchsorted(begin.sort().values, low, right=True)
    closed = torch.searchsorted(end.sort().values, low, right=True)
    low, high = low[opened > closed], high[opened > closed]  # between disjoint blocks there may be gaps
    pieces = (high - low + step - 1) // step
    which = torch.repeat_interleave(torch.arange(len(low)), pieces)
    inside = torch.arange(len(which)) - (pieces.cumsum(0) - pieces)[which]
    at = low[which] + inside * step
    sizes = (high[which] - at).clamp(max=step)
    base = torch.searchsorted(at, begin)
    number = torch.searchsorted(at, end) - base
    by_start = torch.argsort(begin, stable=True)
    block = by_start[torch.searchsorted(begin[by_start], at, right=True) - 1]
    first, even, pattern = _patterns(at, sizes, order, step)
    single, alike = bool((number == 1).all()), bool(even.all())
    return Pieces(at, sizes, first, even, pattern, block, base, number, int(number.max()), single, alike)


def _patterns(
    at: torch.Tensor, sizes: torch.Tensor, order: torch.Tensor | None, step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """First tokens; which pieces are laid out like most; and how they are: a kernel then needs no order for them."""
    even = sizes == step
    if order is None:
        return at, even, None
    if not bool(even.any()):
        return order[at], even, torch.arange(step, dtype=torch.int32)
    tokens = order[at[even][:, None] + torch.arange(step)]
    layouts, which, times = torch.unique(tokens - tokens[:, :1], dim=0, return_inverse=True, return_counts=True)
    common = int(times.argmax())
    even[even.clone()] = which == common
    return order[at], even, layouts[common].to(torch.int32)


def _cut_unknown(
    start: torch.Tensor, size: torch.Tensor, order: torch.Tensor | None, length: int, step: int, device: torch.device
) -> Pieces:
    begin, size = upload(start, device).long(), upload(size, device).long()
    number = (size + step - 1) // step
    ends = number.cumsum(0)
    piece = torch.arange(len(begin) + length // step, device=device)
    block = torch.searchsorted(ends, piece, right=True).clamp(max=len(begin) - 1)
    inside = (piece - (ends - number)[block]) * step
    sizes = (size[block] - inside).clamp(0, step)
    at = torch.where(sizes > 0, begin[block] + inside, 0)
    even = (sizes == step) & (order is None)  # else how a piece is laid out is not known here
    return Pieces(at, sizes, at, even, None, block, ends - number, number, -(-length // step))
