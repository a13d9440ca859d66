"""A block plan as a list of jobs for the CPU backend: query blocks that can stand side by side in one attention call.

Blocks go together that have the same number of queries and of keys and the same mask. A job is cut into chunks small
enough for the caches; what a chunk gathers is worked out when it runs and shared by all heads.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch

from attn_plugins.plan.block_plan import BlockPlan


@dataclass(frozen=True)
class Job:
    """Query blocks `rows` (R,) of `queries` rows each that see `keys` keys each; `masked` ones share one mask."""

    rows: torch.Tensor
    queries: int
    keys: int
    masked: bool


@dataclass(frozen=True)
class Chunk:
    """What one attention call needs: token numbers, and the mask as a bias. None stands for all tokens in order."""

    q_tokens: torch.Tensor | None  # (R * T,)
    kv_tokens: torch.Tensor | None  # (R * E,)
    rows: int
    bias: torch.Tensor | None  # (1, 1, T, E)


def plan_jobs(plan: BlockPlan, item: int, head: int) -> list[Job]:
    """The jobs of one (batch item, head) of the plan's lists, made once and kept with the plan."""
    cached = plan.prepared.setdefault("jobs", {})
    if (item, head) not in cached:
        sizes = torch.where(plan.lists[item, head] >= 0, plan.kv_size[plan.lists[item, head].clamp(min=0).long()], 0)
        keys, queries = sizes.sum(-1).tolist(), plan.q_size.tolist()
        masked = (plan.full[item, head] < plan.count[item, head]).tolist()
        groups: dict[Hashable, list[int]] = {}
        for row, (n, m) in enumerate(zip(queries, keys, strict=True)):
            if m:
                pattern = plan.rule.pattern(row, item, head) if masked[row] and plan.rule is not None else None
                groups.setdefault((n, m, masked[row], pattern), []).append(row)
        cached[item, head] = [
            Job(torch.tensor(rows), queries[rows[0]], keys[rows[0]], masked[rows[0]]) for rows in groups.values()
        ]
    return cached[item, head]


def chunks(plan: BlockPlan, item: int, head: int, job: Job, longest: int, dtype: torch.dtype) -> Iterator[Chunk]:
    """The chunks of a job: at most `longest` gathered keys each, but at least one query block."""
    bias = None
    if job.masked:
        assert plan.rule is not None  # masked rows have a rule by construction
        mask = plan.rule.mask(plan, int(job.rows[0]), item, head)
        bias = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))[None, None]
    for rows in job.rows.split(max(1, longest // job.keys)):
        q_tokens = plan.q_tokens(rows).reshape(-1)
        if job.masked and plan.rule is not None:
            kv_tokens = plan.rule.keys(plan, rows, item, head).reshape(-1)
        else:
            kv_tokens = plan.kv_tokens(rows, item, head).reshape(-1)
        whole = [len(t) == n and _in_order(t) for t, n in ((q_tokens, plan.q_length), (kv_tokens, plan.kv_length))]
        yield Chunk(None if whole[0] else q_tokens, None if whole[1] else kv_tokens, len(rows), bias)


def _in_order(tokens: torch.Tensor) -> bool:
    return bool((tokens == torch.arange(len(tokens))).all())
