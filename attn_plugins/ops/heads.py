"""Heads and batch items of different settings: equal ones go together, and each group is a problem of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

Setting = TypeVar("Setting", bound=Hashable)
Item = TypeVar("Item")
Pair = tuple[torch.Tensor, torch.Tensor]


def attend_by_head(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    settings: Sequence[Setting],
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Setting], Pair],
) -> Pair:
    """Output (B, H, N, D), in q's memory layout, and LSE (B, H, N) of heads that each have a setting.

    Args:
        settings: one per query head.
        attend: output and LSE of heads of one setting; it is called once for each, in order of their first heads.
    """
    groups: dict[Setting, list[int]] = {}
    for head, setting in enumerate(settings):
        groups.setdefault(setting, []).append(head)
    if len(groups) == 1:
        return attend(q, k, v, settings[0])
    order: list[int] = []
    outs, lses = [], []
    for setting, members in groups.items():
        heads = torch.tensor(members, device=q.device)
        kv = torch.tensor(kv_heads_of(members, q.shape[1], k.shape[1]), device=q.device)
        out, lse = attend(q[:, heads], k[:, kv], v[:, kv], setting)
        order += members
        outs.append(out)
        lses.append(lse)
    back = torch.tensor([order.index(head) for head in range(len(order))], device=q.device)
    return torch.empty_like(q).copy_(torch.cat(outs, dim=1)[:, back]), torch.cat(lses, dim=1)[:, back]


def kv_heads_of(heads: Sequence[int], q_heads: int, kv_heads: int) -> list[int]:
    """The KV head of each of some query heads, or fewer where these are whole groups of query heads that share one."""
    size = q_heads // kv_heads
    wanted = [head // size for head in heads]
    distinct = list(dict.fromkeys(wanted))
    whole = wanted == [kv for kv in distinct for _ in range(size)]
    return distinct if whole else wanted


def equal_runs(items: Sequence[Item]) -> list[tuple[slice, Item]]:
    """Each run of equal items, and where it stands; a run that is alone stands everywhere, `slice(None)`."""
    runs, first = [], 0
    for item, same in itertools.groupby(items):
        last = first + len(list(same))
        runs.append((slice(first, last), item))
        first = last
    return [(slice(None), runs[0][1])] if len(runs) == 1 else runs
