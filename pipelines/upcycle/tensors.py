"""A mixture's tensors out of the experts', one at a time: never more of the models in memory than one tensor of each
expert that it is made of, and a mean of large ones goes by pieces."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins.models.bam import Architecture
from attn_plugins.models.bam.layout import Source, source_of
from attn_plugins.pipelines.upcycle.checkpoint import Checkpoint

_PIECE = 1 << 20  # elements of a mean at a time


@dataclass(frozen=True)
class Mixing:
    """How a mixture of this config is made of these experts.

    Attributes:
        members: an expert each; names: the dense model's tensors as each spells them.
        routers: rows that were found for routers (`router_init: hidden`), by the router's name.
    """

    row: Architecture
    config: Any
    members: Sequence[Checkpoint]
    names: Sequence[Mapping[str, str]]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    seed: int = 0
    routers: Mapping[str, torch.Tensor] | None = None

    def source(self, name: str) -> Source:
        return source_of(name, self.shapes[name], self.row, self.config)

    def routed(self) -> list[str]:
        """Dense tensors of which every expert keeps its own."""
        sources = [self.source(name) for name in self.shapes]
        return list(dict.fromkeys(dense for source in sources if source.kind == "experts" for dense in source.names))

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor, as pieces of its rows in order."""
        source = self.source(name)
        if source.kind == "mean":
            yield from self._mean(source)
        elif source.kind == "experts":
            yield self._joined(source, self.shapes[name])
        else:
            yield self._router(name)

    def _joined(self, source: Source, shape: tuple[int, ...]) -> torch.Tensor:
        out = torch.empty(shape, dtype=self.dtype)
        for number, (member, names) in enumerate(zip(self.members, self.names, strict=True)):
            source.place(out, number, [member.tensor(names[dense]) for dense in source.names])
        return out

    def _mean(self, source: Source) -> Iterator[torch.Tensor]:
        """Summed in float64, for in float32 the mean of three equal numbers may differ from them."""
        dense = source.names[0]
        shape = self.members[0].shapes[self.names[0][dense]]
        step = max(1, _PIECE * shape[0] // max(1, torch.Size(shape).numel()))
        if source.fused is not None:
            step = shape[0]  # whole heads, of a layer
        for start in range(0, shape[0], step):
            total: torch.Tensor | None = None
            for member, names in zip(self.members, self.names, strict=True):
                part = source.picked(member.rows(names[dense], start, start + step)).double()
                total = part if total is None else total.add_(part)
            assert total is not None  # there is at least one expert
            yield (total / len(self.members)).float()

    def _router(self, name: str) -> torch.Tensor:
        if self.routers is not None:
            return self.routers[name]
        # Of its name, and not of the order of writing: a run that was resumed makes the same ones.
        seed = zlib.crc32(name.encode()) ^ (self.seed << 32)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.shapes[name], generator=generator) * self.config.initializer_range
