"""Which prompt each token of a grid belongs to: by shares (attention couple), or to one alone (object ids)."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from attn_plugins.methods.regions.areas import Area
from attn_plugins.plan.block_plan import BlockPlan

_serial = itertools.count(1)
_layouts: weakref.WeakValueDictionary[int, RegionLayout] = weakref.WeakValueDictionary()
_lock = threading.Lock()
KEPT = 64  # plans of a layout: a few grids, times the lengths of text that a pipeline is called with


class RegionLayout:
    """Where R prompts are. Prompt 0 is the person's own: it has what no region covers.

    Args:
        areas: of the regions 1..R.
        weights: R numbers above 0, by which the regions' masks are multiplied.
        base: what prompt 0 weighs everywhere.
        names: of the regions, for errors.

    Attributes:
        key: an int by which custom ops find it.
    """

    def __init__(
        self, areas: Sequence[Area], weights: Sequence[float], base: float = 0.0, names: Sequence[str] | None = None
    ) -> None:
        self.areas = tuple(areas)
        self.weights = tuple(weights)
        self.base = base
        self.names = tuple(names or (f"region {number}" for number in range(1, len(self.areas) + 1)))
        self._kept: dict[Hashable, Any] = {}
        self._plans: dict[Hashable, BlockPlan] = {}
        self.key = next(_serial)
        with _lock:
            _layouts[self.key] = self

    @staticmethod
    def by_key(key: int) -> RegionLayout:
        """The living layout of that key.

        Raises:
            RuntimeError: it has been freed; a patch keeps its own.
        """
        found = _layouts.get(key)
        if found is None:
            raise RuntimeError(f"region layout {key} no longer exists: the patch that it is of was taken out")
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return RegionLayout, (self.areas, self.weights, self.base, self.names)  # a copy has a key of its own

    @property
    def count(self) -> int:
        """Prompts, the person's own among them."""
        return len(self.areas) + 1

    def coverage(self, grid: tuple[int, ...]) -> torch.Tensor:
        """(R + 1, N) float64 in 0..1: the masks on a grid, area by area; row 0 is what they leave uncovered.

        Raises:
            ValueError: a mask that covers nothing of this grid, by name.
        """
        rows = []
        for name, area in zip(self.names, self.areas, strict=True):
            row = area.on(grid).round(decimals=9)
            if not bool(row.any()):
                raise ValueError(f"the mask of {name} covers nothing of a grid of {'x'.join(map(str, grid))} tokens")
            rows.append(row)
        masks = torch.stack(rows)
        return torch.cat([(1 - masks.sum(0, keepdim=True)).clamp(min=0.0), masks])

    def shares(self, grid: tuple[int, ...], device: torch.device | None = None) -> torch.Tensor:
        """(R + 1, N) float32, columns adding up to 1: the share of each prompt in each token."""
        device = device or torch.device("cpu")
        return self._once(("shares", grid, device), lambda: self._shares(grid).to(device))

    def _shares(self, grid: tuple[int, ...]) -> torch.Tensor:
        found = self.coverage(grid)
        found[0] += self.base
        found[1:] *= torch.tensor(self.weights, dtype=torch.float64)[:, None]
        return (found / found.sum(0)).float()

    def ids(self, grid: tuple[int, ...]) -> torch.Tensor:
        """(N,) int64: the prompt that each token belongs to alone, by the largest mask; `base` does not count.

        On a tie a region wins over the uncovered, and an earlier region over a later one. A region that would have no
        token at all on a coarse grid gets the one that it covers most.

        Raises:
            ValueError: more regions at a place than a coarse grid has tokens there; the message names one.
        """
        return self._once(("ids", grid), lambda: self._ids(grid))

    def _ids(self, grid: tuple[int, ...]) -> torch.Tensor:
        found = self.coverage(grid)
        found[1:] *= torch.tensor(self.weights, dtype=torch.float64)[:, None]
        best, ids = torch.zeros_like(found[0]), torch.zeros(found.shape[1], dtype=torch.int64)
        for number in range(1, self.count):
            better = found[number] > best
            best, ids = torch.where(better, found[number], best), torch.where(better, number, ids)
        ids = torch.where(best >= found[0], ids, 0)
        for number in range(1, self.count):
            if not bool((ids == number).any()):
                sizes = torch.bincount(ids, minlength=self.count)
                free = (ids == 0) | (sizes[ids] > 1)  # taking another region's only token would move the trouble
                covered = torch.where(free, found[number], 0.0)
                if not bool(covered.any()):
                    raise ValueError(
                        f"{self.names[number - 1]} has no token of its own on a grid of {'x'.join(map(str, grid))} "
                        "tokens: others lie over it. Enlarge it, or use mode='couple' with self_attention='full'"
                    )
                ids[int(torch.argmax(covered))] = number
        return ids

    def is_hard(self, grid: tuple[int, ...]) -> bool:
        """Whether each token is one prompt's alone."""
        return self._once(("hard", grid), lambda: bool((self.shares(grid).max(0).values == 1).all()))

    def plan(self, key: Hashable, make: Callable[[], BlockPlan]) -> BlockPlan:
        """The plan of that key, made once."""
        if key not in self._plans:
            if len(self._plans) >= KEPT:
                self._plans.pop(next(iter(self._plans)), None)
            self._plans[key] = make()
        return self._plans[key]

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            if len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)), None)
            self._kept[key] = make()
        return self._kept[key]
