"""Plans of tokens in groups: a query sees the keys of some groups whole, and nothing else.

A stable sort by group makes each group a run, so the plan is a few blocks without masks, whatever the groups look like
on the grid (Through-The-Mask, arXiv 2501.03059, masks the same pairs by a matrix of N x N).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from attn_plugins.plan.block_plan import BlockPlan


class _Runs(NamedTuple):
    order: torch.Tensor | None
    start: torch.Tensor
    size: torch.Tensor
    group: torch.Tensor


def grouped_plan(q_group: torch.Tensor, kv_group: torch.Tensor, sees: torch.Tensor) -> BlockPlan:
    """The plan in which a query of group i sees the keys of group j iff `sees[i, j]`.

    Args:
        q_group: (N,) int64, the group of each query; -1: it sees nothing, and gives 0.
        kv_group: (N_kv,) int64, the group of each key; -1: nobody sees it.
        sees: (groups of queries, groups of keys) bool. Groups without tokens may stand in it.

    Raises:
        ValueError: a group that `sees` has no row or column for.
    """
    for name, group, known in (("q_group", q_group, sees.shape[0]), ("kv_group", kv_group, sees.shape[1])):
        if len(group) and not -1 <= int(group.min()) <= int(group.max()) < known:
            raise ValueError(f"{name} has groups {int(group.min())}..{int(group.max())}, sees is for 0..{known - 1}")
    rows, columns = _runs(q_group), _runs(kv_group)
    visible = sees[rows.group][:, columns.group]
    if not bool(visible.any()):
        return _nothing(len(q_group), len(kv_group))
    count = visible.sum(1, dtype=torch.int32)
    lists = torch.sort(~visible, dim=1, stable=True).indices[:, : int(count.max())].to(torch.int32)
    lists = lists.masked_fill(torch.arange(lists.shape[1]) >= count[:, None], -1)
    count = count[None, None]
    return BlockPlan(
        len(q_group), len(kv_group), rows.start, rows.size, columns.start, columns.size,
        lists[None, None], count, count, q_order=rows.order, kv_order=columns.order,
    )  # fmt: skip


def _runs(group: torch.Tensor) -> _Runs:
    """The groups that have tokens, as runs of the sorted order; tokens of group -1 come first and are in no run."""
    order = torch.argsort(group, stable=True)
    outside = int((group < 0).sum())
    count = torch.bincount(group[group >= 0])
    start = outside + torch.cumsum(count, 0) - count
    there = torch.nonzero(count)[:, 0]
    sorted_already = bool((order == torch.arange(len(order))).all())
    return _Runs(None if sorted_already else order, start[there].int(), count[there].int(), there)


def _nothing(queries: int, keys: int) -> BlockPlan:
    """Nobody sees anything: one block each, in no list."""
    zero, none = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32)
    sizes = (torch.tensor([size], dtype=torch.int32) for size in (queries, keys))
    q_size, kv_size = sizes
    return BlockPlan(queries, keys, zero, q_size, zero, kv_size, none[..., None] - 1, none, none)
