"""The rows and keys of a job as the attention step takes them, and its results back to where they belong."""

from __future__ import annotations

import torch

from attn_plugins.ops.routed_heads.jobs import Job, Part
from attn_plugins.ops.routed_heads.rows import Rows, flat, readable


class Gathered:
    """Rows copied side by side, (1, heads, rows, ...); heads with fewer rows than others repeat their last one."""

    def __init__(self, job: Job, rows: Rows, offset: int) -> None:
        assert job.starts is not None and job.sizes is not None
        self.job, self.sizes = job, job.sizes
        device = rows.tokens.device
        starts, sizes = torch.tensor([job.starts, job.sizes], device=device)[..., None]
        step = torch.arange(max(job.sizes), device=device)
        self.pick = starts + torch.minimum(step, sizes - 1)
        self.spare = step >= sizes if min(job.sizes) < max(job.sizes) else None
        self.rows, self.offset = rows, offset

    def read(self, t: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) to (1, heads, rows, D)."""
        lines, steps = readable(t)
        return lines.index_select(0, self._lines(steps)).view(1, *self.pick.shape, -1)

    def write(self, t: torch.Tensor, values: torch.Tensor) -> None:
        """Back to (B, H, N, D), which has a view by rows."""
        found = flat(t)
        assert found is not None  # made by `room_like`
        lines, at = found[0], self._lines(found[1]).view(self.pick.shape)
        if self.spare is None:
            lines.index_copy_(0, at.flatten(), values.flatten(0, 2))
            return
        for head, size in enumerate(self.sizes):
            lines.index_copy_(0, at[head, :size], values[0, head, :size])

    def keys(self, t: torch.Tensor, part: Part) -> torch.Tensor:
        """(B, H_kv, N_kv, D) to (1, heads, part, D): a view, or a copy where heads between are left out."""
        return _heads(t[self.job.item, :, part.first : part.end], self.job.kv)[None]

    def add(self, t: torch.Tensor, part: Part, values: torch.Tensor) -> None:
        """Add gradients of the keys of a part to (B, H_kv, N_kv, D)."""
        _add(t[self.job.item, :, part.first : part.end], self.job.kv, values[0])

    def bias(self, part: Part, dtype: torch.dtype) -> torch.Tensor | None:
        """(1, heads, rows, part): 0 up to a row's own key, -inf behind it."""
        if not part.masked:
            return None
        length = part.end - part.first
        line = torch.zeros(2 * length, dtype=dtype, device=self.pick.device)
        line[length:] = float("-inf")
        # Row r of this table, which has no memory of its own, sees all but the last r keys: a mask is made by copying.
        table = line.as_strided((length, length), (1, 1))
        last = self.rows.tokens[self.pick.flatten()] + (self.offset - part.first)
        return table.index_select(0, length - 1 - last).view(1, *self.pick.shape, length)

    def wanted(self, values: torch.Tensor) -> torch.Tensor:
        """Values whose repeated rows are 0, so that they add nothing to a sum."""
        return values if self.spare is None else values.masked_fill_(self.spare[None, ..., None], 0.0)

    def clean(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def _lines(self, steps: tuple[int, int, int]) -> torch.Tensor:
        return self.rows.index(steps)[self.pick.flatten()]


class Dense:
    """All rows of the query heads of a job as views, (heads, group, rows, ...); of a group of one, (1, heads, ...).

    Those that are not wanted are computed along and masked.
    """

    def __init__(self, job: Job, mask: torch.Tensor, kv_heads: int) -> None:
        self.job, self.kv_heads = job, kv_heads
        self.group = mask.shape[2] // kv_heads
        self.unwanted = ~self.read(mask.transpose(1, 2)[..., None]) if job.partial else None

    def read(self, t: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) to (heads, group, rows, D)."""
        rows = t[self.job.item, :, self.job.start : self.job.stop].unflatten(0, (self.kv_heads, self.group))
        return self._shaped(_heads(rows, self.job.kv))

    def write(self, t: torch.Tensor, values: torch.Tensor) -> None:
        whole = t[self.job.item, :, self.job.start : self.job.stop].unflatten(0, (self.kv_heads, self.group))
        rows = values[0][:, None] if self.group == 1 else values
        if len(self.job.kv) == self.kv_heads:
            whole.copy_(rows)
        else:
            whole[self.job.kv] = rows

    def keys(self, t: torch.Tensor, part: Part) -> torch.Tensor:
        some = _heads(t[self.job.item, :, part.first : part.end], self.job.kv)[:, None]
        return self._shaped(some.expand(-1, self.group, -1, -1))

    def add(self, t: torch.Tensor, part: Part, values: torch.Tensor) -> None:
        total = values[0] if self.group == 1 else values.sum(1, dtype=t.dtype)
        _add(t[self.job.item, :, part.first : part.end], self.job.kv, total)

    def bias(self, part: Part, dtype: torch.dtype) -> None:
        return None

    def wanted(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.unwanted is None else values.masked_fill_(self.unwanted, 0.0)

    def clean(self, values: torch.Tensor) -> torch.Tensor:
        """Without what stands in rows that are not wanted: it may be nan, which times 0 is nan."""
        return values if self.unwanted is None else values.masked_fill(self.unwanted, 0.0)

    def _shaped(self, t: torch.Tensor) -> torch.Tensor:
        return t.transpose(0, 1) if self.group == 1 else t


def _heads(t: torch.Tensor, heads: list[int]) -> torch.Tensor:
    """Some of the first axis, ascending: a view where they are neighbours."""
    if heads[-1] - heads[0] + 1 == len(heads):
        return t[heads[0] : heads[-1] + 1]
    return t[heads]


def _add(t: torch.Tensor, heads: list[int], values: torch.Tensor) -> None:
    if heads[-1] - heads[0] + 1 == len(heads):
        t[heads[0] : heads[-1] + 1] += values
    else:
        t[heads] += values.to(t.dtype)
