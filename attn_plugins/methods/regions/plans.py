"""The block plans of regions, and the operator that runs them: a compiled graph carries a list of ints of each."""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from attn_plugins.methods.regions.layout import RegionLayout
from attn_plugins.ops.block_sparse.op import register_sparse_op
from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.groups import grouped_plan
from attn_plugins.sequence import Sequence

ALL = -1  # of `Call.prompt`: each token its own prompt's, in one plan


@dataclass(frozen=True)
class Call:
    """What a plan is for.

    lengths: tokens of the prompts: of the keys where queries are the grid alone (cross-attention), else of the text
    before the grid (`before`) or behind it; empty: there is no text (self-attention). others: further tokens behind
    all that (reference pictures). own: a token of the grid sees those of its own region alone. prompt: of couple, the
    one that is seen; ALL: each token's own.
    """

    grid: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    cross: bool = False
    before: bool = False
    others: int = 0
    own: bool = False
    prompt: int = ALL

    def encode(self, layout: RegionLayout) -> list[int]:
        flags = [int(flag) for flag in (self.cross, self.before, self.own)]
        return [layout.key, *flags, self.others, self.prompt, len(self.grid), *self.grid, *self.lengths]

    def of(self, prompt: int) -> Call:
        """The same of one prompt."""
        return Call(self.grid, self.lengths, self.cross, self.before, self.others, self.own, prompt)

    @classmethod
    def decode(cls, spec: Rows[int]) -> tuple[RegionLayout, Call]:
        key, cross, before, own, others, prompt, axes, *rest = (int(value) for value in spec)
        grid, lengths = tuple(rest[:axes]), tuple(rest[axes:])
        return RegionLayout.by_key(key), cls(grid, lengths, bool(cross), bool(before), others, bool(own), prompt)

    @classmethod
    def joint(cls, sequence: Sequence, lengths: tuple[int, ...], own: bool) -> Call:
        """Of joint attention; `sequence` holds the text of all prompts, on the side where it is as long as they are.

        Raises:
            ValueError: neither side is.
        """
        length = sum(lengths)
        before = sequence.text_before == length
        if not before and (sequence.text_after < length or sequence.text_before):
            raise ValueError(
                f"regions: prompts of {length} tokens in a sequence with {sequence.text_before} of text before the "
                f"grid and {sequence.text_after} behind it: the model has changed its text on the way"
            )
        others = sequence.text_after - (0 if before else length)
        return cls(sequence.grid, lengths, False, before, others, own)


def plan_of(layout: RegionLayout, call: Call) -> BlockPlan:
    """The plan of a call, made once a layout."""
    return layout.plan(call, lambda: _made(layout, call))


def _made(layout: RegionLayout, call: Call) -> BlockPlan:
    count = layout.count
    text = torch.repeat_interleave(torch.arange(len(call.lengths)), torch.tensor(call.lengths, dtype=torch.int64))
    if call.cross:
        if call.prompt == ALL:
            return grouped_plan(layout.ids(call.grid), text, torch.eye(count, dtype=torch.bool))
        mine = torch.where(layout.shares(call.grid)[call.prompt] > 0, 0, -1)
        return grouped_plan(mine, torch.where(text == call.prompt, 0, -1), torch.ones(1, 1, dtype=torch.bool))
    if not call.lengths:
        ids = layout.ids(call.grid)
        return grouped_plan(ids, ids, torch.eye(count, dtype=torch.bool))
    return _joint_plan(layout, call, text)


def _joint_plan(layout: RegionLayout, call: Call, text: torch.Tensor) -> BlockPlan:
    """Groups: the tokens of the grid by id, twice (2 i + 1: the plan's prompts have a share in them); texts; others.

    A token sees the grid (or its own part of it), its prompt, and the others; a prompt sees itself, the others and
    where it has a share; the others see the grid, themselves and prompt 0, as if there were no regions.
    """
    count = layout.count
    every = call.prompt == ALL
    told_apart = every or call.own  # else small regions need no token of their own
    ids = layout.ids(call.grid) if told_apart else torch.zeros(math.prod(call.grid), dtype=torch.int64)
    shared = torch.ones_like(ids, dtype=torch.bool) if every else layout.shares(call.grid)[call.prompt] > 0
    grid = 2 * ids + shared.long()
    others = torch.full((call.others,), 3 * count, dtype=torch.int64)
    parts = [2 * count + text, grid, others] if call.before else [grid, 2 * count + text, others]
    group = torch.cat(parts)

    sees = torch.zeros(3 * count + 1, 3 * count + 1, dtype=torch.bool)
    for one in range(count):
        if every or one == call.prompt:
            mine = 2 * count + one
            sees[mine, mine] = sees[mine, 3 * count] = True
            sees[mine, [2 * one + 1] if every else list(range(1, 2 * count, 2))] = True
        own = [2 * one, 2 * one + 1] if call.own else list(range(2 * count))
        prompt = one if every else call.prompt
        sees[2 * one + 1, [*own, 2 * count + prompt, 3 * count]] = True
    if call.prompt in (ALL, 0):
        sees[3 * count, [*range(2 * count), 2 * count, 3 * count]] = True
    return grouped_plan(group, group, sees)


def _plans_of(spec: Rows[int], q: torch.Tensor, backend: str) -> list[tuple[slice, BlockPlan]]:
    return [(slice(None), plan_of(*Call.decode(spec)))]


attend = register_sparse_op("regions", _plans_of)


@torch.library.custom_op(
    "attn_plugins::region_shares",
    mutates_args=(),
    schema="(Tensor like, SymInt key, SymInt count, SymInt[] grid) -> Tensor",
)
def region_shares(like, key, count, grid):  # type: ignore[no-untyped-def]
    """`RegionLayout.shares` on the device of `like`, for compiled code; a copy, for a graph may write into it."""
    return RegionLayout.by_key(key).shares(tuple(grid), like.device).clone()


@region_shares.register_fake
def _(like, key, count, grid):  # type: ignore[no-untyped-def]
    tokens = 1
    for size in grid:
        tokens = tokens * size
    return like.new_empty((count, tokens), dtype=torch.float32)
