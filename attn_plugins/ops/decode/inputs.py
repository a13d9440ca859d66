"""What `decode_attention` is given: checks that need no value of a tensor, and the rule of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from attn_plugins.ops.checks import DTYPES, INTEGERS


@dataclass(frozen=True)
class Positions:
    """Where keys and queries stand: keys (1 or B, total), queries (1 or B, Nq), spans (H,) or None (no limit)."""

    keys: torch.Tensor
    queries: torch.Tensor
    spans: torch.Tensor | None
    sink: int

    def of_items(self, items: slice) -> Positions:
        """Those of some batch items; the keys stay."""
        return self if self.queries.shape[0] == 1 else replace(self, queries=self.queries[items])

    def seen(self, keys: torch.Tensor, heads: slice = slice(None)) -> torch.Tensor:
        """The rule: which of `keys` (b, h or 1, n) each query of some heads sees, (b, h, Nq, n) bool."""
        spans = None if self.spans is None else self.spans[heads, None, None]
        return self.sees(self.queries[:, None, :, None], keys[:, :, None, :], spans)

    def sees(self, i: torch.Tensor, j: torch.Tensor, spans: torch.Tensor | None) -> torch.Tensor:
        """Whether queries at i, of heads with these spans, see keys at j: shapes that broadcast."""
        age = i - j
        seen = (j >= 0) & (age >= 0)
        return seen if spans is None else seen & ((j < self.sink) | (age < spans))


def check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: torch.Tensor) -> None:
    """Shapes, dtypes and devices.

    Raises:
        ValueError, TypeError: as `decode_attention` says.
    """
    if q.dim() != 4 or k.dim() != 3 or v.shape != k.shape:
        legal = "q is (batch, heads, queries, head_dim); k and v are (batch, total, head_dim)"
        raise ValueError(f"{_shapes(q, k, v)}: {legal}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[2]:
        raise ValueError(f"{_shapes(q, k, v)}: q, k and v share batch and head_dim")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        legal = ", ".join(str(dtype)[6:] for dtype in DTYPES)
        raise TypeError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: cast them to one floating dtype: {legal}")
    if not isinstance(ranges, torch.Tensor) or ranges.dtype not in INTEGERS:
        kind = ranges.dtype if isinstance(ranges, torch.Tensor) else type(ranges).__name__
        raise TypeError(f"ranges are {kind}: give a tensor of int32 or int64")
    if ranges.dim() != 4 or ranges.shape[3] != 2 or ranges.shape[0] not in (1, q.shape[0]):
        raise ValueError(f"ranges {tuple(ranges.shape)}: legal is (1 or {q.shape[0]}, KV heads, ranges, 2)")
    if ranges.shape[1] == 0 or q.shape[1] % ranges.shape[1]:
        raise ValueError(f"the {q.shape[1]} query heads must be a multiple of the {ranges.shape[1]} KV heads of ranges")
    if not q.device == k.device == v.device == ranges.device:
        raise ValueError(
            f"q is on {q.device}, k on {k.device}, v on {v.device}, ranges on {ranges.device}: move them to one device"
        )


def _shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def check_positions(
    q: torch.Tensor,
    k: torch.Tensor,
    kv_heads: int,
    keys: torch.Tensor | None,
    queries: torch.Tensor | None,
    spans: int | Sequence[int] | torch.Tensor | None,
    sink: int,
) -> Positions | None:
    """The rule, or None where every query sees all keys of its ranges.

    Raises:
        ValueError, TypeError: as `decode_attention` says.
    """
    if keys is None or queries is None:
        if keys is not queries:
            raise ValueError("key_positions and query_positions belong together: give both or neither")
        if spans is not None or sink:
            raise ValueError(f"spans={spans}, sink={sink} are of positions: give key_positions and query_positions")
        return None
    for name, given, length in (("key_positions", keys, k.shape[1]), ("query_positions", queries, q.shape[2])):
        if given.dtype not in INTEGERS:
            raise TypeError(f"{name} are {given.dtype}: give int32 or int64")
        if given.dim() != 2 or given.shape[0] not in (1, q.shape[0]) or given.shape[1] != length:
            raise ValueError(f"{name} {tuple(given.shape)}: legal is (1 or {q.shape[0]}, {length})")
        if given.device != q.device:
            raise ValueError(f"{name} are on {given.device}, q on {q.device}: move them to one device")
    if sink < 0:
        raise ValueError(f"sink={sink}: legal is 0 or more")
    return Positions(keys, queries, _per_head(spans, q, kv_heads), sink)


def _per_head(spans: int | Sequence[int] | torch.Tensor | None, q: torch.Tensor, kv_heads: int) -> torch.Tensor | None:
    """Spans of all query heads, (H,)."""
    if spans is None:
        return None
    heads = q.shape[1]
    if isinstance(spans, int):
        spans = [spans] * heads
    if not isinstance(spans, torch.Tensor):
        if any(span < 0 for span in spans):
            raise ValueError(f"spans={list(spans)}: legal is 0 or more")
        spans = torch.tensor(list(spans), dtype=torch.int64, device=q.device)
    if spans.dtype not in INTEGERS or spans.device != q.device:
        raise TypeError(f"spans are {spans.dtype} on {spans.device}: give int32 or int64 on {q.device}")
    if spans.dim() != 1 or spans.shape[0] not in (kv_heads, heads):
        raise ValueError(
            f"spans {tuple(spans.shape)}: give one number, one per KV head ({kv_heads}) or per query head ({heads})"
        )
    return spans if spans.shape[0] == heads else spans.repeat_interleave(heads // kv_heads)
