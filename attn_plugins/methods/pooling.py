"""What methods share that pool tokens of a grid: where the pooled ones come from, text with its padding, the cost."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

import torch

from attn_plugins.method import AttentionCall, Processor
from attn_plugins.ops.agent import pool_tokens
from attn_plugins.ops.heads import equal_runs
from attn_plugins.sequence import Sequence

# (batch items, what their tokens are, none of them padding, q, k, v of these tokens) -> their output
Attend = Callable[[slice, Sequence, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class PoolingProcessor(Processor):
    """A processor whose cost is less because tokens of the grid are pooled; text is never pooled."""

    measure = "cost"
    wants_plain = True

    def refuses(self, call: AttentionCall) -> str | None:
        if call.q.shape[2] != call.k.shape[2]:
            return f"{call.k.shape[2]} keys for {call.q.shape[2]} queries: pooling needs one grid for both"
        if call.causal:
            return "the model masks the future, and pooled tokens know no order"
        return super().refuses(call)

    @abstractmethod
    def pairs(self, sequence: Sequence) -> int:
        """(query, key) pairs that are computed for a sequence without padding: what dense attention has N * N of."""

    def density(self, sequence: Sequence) -> float:
        """Share of dense attention's cost."""
        rows = [self.pairs(without_padding(sequence.item(index))) for index in range(sequence.batch or 1)]
        return sum(rows) / len(rows) / sequence.length**2


def pooled(call: AttentionCall, which: Literal["q", "k", "v"], to: tuple[int, ...]) -> torch.Tensor:
    """The grid's tokens of q, k or v as means over `to` cells, (B, H, prod(to), D).

    Queries and keys are pooled before norm and rotation, where the interception tells how the layer does both.
    """
    sequence = call.sequence
    assert sequence is not None  # Layer.attend calls no processor without one
    found = None
    if which != "v" and call.plain is not None and to != sequence.grid:
        found = call.plain.pooled(which, call, to)
    return pool_tokens(getattr(call, which), sequence.grid, to, sequence.text_before) if found is None else found


def without_padding(item: Sequence) -> Sequence:
    """One batch item's sequence with only the text that is real."""
    assert isinstance(item.valid_before, int) and isinstance(item.valid_after, int)  # an item's are
    return Sequence(item.grid, item.valid_before, item.valid_after)


def attend_real_tokens(call: AttentionCall, attend: Attend) -> torch.Tensor:
    """`attend` on the tokens that are no padding, for items of one length together; rows of padding give 0."""
    sequence = call.sequence
    assert sequence is not None  # Layer.attend calls no processor without one
    if not sequence.padded:
        return attend(slice(None), sequence, call.q, call.k, call.v)
    out = torch.zeros_like(call.q)
    for items, item in equal_runs([sequence.item(index) for index in range(call.q.shape[0])]):
        real = without_padding(item)
        rows = [slice(0, real.text_before), slice(item.text_before, item.text_before + real.tokens + real.text_after)]
        q, k, v = (torch.cat([t[items, :, part] for part in rows], dim=2) for t in (call.q, call.k, call.v))
        found = attend(items, real, q, k, v).split([real.text_before, real.tokens + real.text_after], dim=2)
        for part, values in zip(rows, found, strict=True):
            out[items, :, part] = values
    return out
