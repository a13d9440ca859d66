"""Which keys of a part the queries see, by their positions: looked at first, made a mask only where one is needed."""

from __future__ import annotations

import torch

from attn_plugins.ops.decode.inputs import Positions
from attn_plugins.ops.decode.parts import Part


class Visibility:
    """The rule of positions over parts. Reads positions on the host."""

    def __init__(self, positions: Positions, kv_heads: int, group: int) -> None:
        self.positions = positions
        self.group = group  # query heads of a KV head
        self.shortest: list[int] | None = None  # span of each KV head
        if positions.spans is not None:
            self.shortest = positions.spans.view(kv_heads, group).amin(1).tolist()
        if positions.queries.numel():
            self.earliest, self.latest = (int(t) for t in positions.queries.aminmax())

    def of(self, part: Part) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Seen keys (b or 1, heads, rows, n), None if all are; empty slots (b or 1, heads, n), None if there are none.

        Rows are the query heads of a KV head, each with all its queries.
        """
        keys = part.read(self.positions.keys)
        if self._all_seen(keys, part):
            return None, None
        empty = keys < 0
        return self._seen(keys, part), empty if bool(empty.any()) else None

    def _all_seen(self, keys: torch.Tensor, part: Part) -> bool:
        """Decided from the least and the greatest position; False where that does not tell."""
        least, greatest = (int(t) for t in keys.aminmax())
        if least < 0 or greatest > self.earliest:
            return False
        if self.shortest is None:
            return True
        span, sink = min(self.shortest[part.kv]), self.positions.sink
        if self.latest - least < span:
            return True
        # A cache keeps its sinks in front: those apart, is the rest inside the span?
        sinks, rest = keys[..., :sink], keys[..., sink:]
        if not sinks.numel() or int(sinks.max()) >= sink:
            return False
        return not rest.numel() or self.latest - int(rest.min()) < span

    def _seen(self, keys: torch.Tensor, part: Part) -> torch.Tensor:
        heads = slice(part.kv.start * self.group, part.kv.stop * self.group)
        each = keys.repeat_interleave(self.group, dim=1)
        return self.positions.of_items(part.items).seen(each, heads).unflatten(1, (part.heads, -1)).flatten(2, 3)
