"""GNA's rule, one (query, key) pair at a time: written from the paper's text, sharing nothing with the library."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch


def axis_keys(x: int, size: int, window: int, stride: int, dilation: int, causal: bool) -> list[int]:
    """The coordinates that the query at coordinate `x` of an axis sees, ascending."""
    if window == -1:
        window = size // dilation
    family = [y for y in range(size) if y % dilation == x % dilation]  # dilation first: only these exist for x
    here = family.index(x)
    leader = here - here % stride
    if causal:
        first = max(0, min(leader + stride, len(family)) - window)
        return family[first : here + 1]
    first = leader + stride // 2 - window // 2
    while first + window > len(family):
        first -= 1
    return family[max(first, 0) : max(first, 0) + window]


@functools.lru_cache(maxsize=512)
def axis_table(size: int, window: int, stride: int, dilation: int, causal: bool) -> torch.Tensor:
    """(size, size) bool."""
    table = torch.zeros(size, size, dtype=torch.bool)
    for x in range(size):
        table[x, axis_keys(x, size, window, stride, dilation, causal)] = True
    return table


def rule_mask(
    grid: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    before: tuple[int, int] = (0, 0),
    after: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """(N, N) bool of one batch item; `before`, `after`: (length, valid) of the text."""
    tables = [axis_table(*row) for row in zip(grid, window, stride, dilation, causal, strict=True)]
    cells = torch.tensor(list(itertools.product(*map(range, grid))))
    seen = torch.ones(len(cells), len(cells), dtype=torch.bool)
    for axis, table in enumerate(tables):
        seen &= table[cells[:, None, axis], cells[None, :, axis]]
    kinds = "t" * before[1] + "." * (before[0] - before[1]) + "g" * len(cells)
    kinds += "t" * after[1] + "." * (after[0] - after[1])
    real = torch.tensor([kind != "." for kind in kinds])
    image = torch.tensor([kind == "g" for kind in kinds])
    mask = real[:, None] & real[None, :]
    mask[image[:, None] & image[None, :]] = seen.flatten()
    return mask


def legal_axes(longest: int) -> Iterator[dict[str, Any]]:
    """Every legal (size, window, stride, dilation, causal) of an axis of up to `longest` tokens."""
    for size in range(1, longest + 1):
        for dilation in range(1, size + 1):
            for window in range(1, size // dilation + 1):
                for stride in range(1, window + 1):
                    for causal in (False, True):
                        yield {
                            "size": size, "window": window, "stride": stride, "dilation": dilation, "causal": causal
                        }  # fmt: skip
