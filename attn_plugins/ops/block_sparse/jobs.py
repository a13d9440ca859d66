"""A block plan as a list of jobs for the CPU backend: query blocks that can stand side by side in one attention call.

Blocks go together that have the same number of queries and of keys and the same mask. A job is cut into chunks small
enough for the caches; what a chunk gathers is worked out when it runs and shared by all heads.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

import torch

from attn_plugins.plan.block_plan import BlockPlan

KEPT_BYTES = 32 << 20  # of token numbers and masks that a plan may keep; beyond that they are made anew in each call


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
    blind: torch.Tensor | None = None  # (1, 1, T) bool, queries that see none of the keys, if there are any

    def to(self, device: torch.device) -> Chunk:
        if device.type == "cpu":
            return self
        q_tokens, kv_tokens, bias, blind = (
            None if t is None else t.to(device) for t in (self.q_tokens, self.kv_tokens, self.bias, self.blind)
        )
        return Chunk(q_tokens, kv_tokens, self.rows, bias, blind)


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


def plan_chunks(plan: BlockPlan, item: int, head: int, longest: int, dtype: torch.dtype) -> Iterable[Chunk]:
    """All chunks of one (batch item, head) of the plan's lists; kept with the plan where they are small.

    A chunk has at most `longest` gathered keys, but at least one query block.
    """
    jobs = plan_jobs(plan, item, head)
    entries = sum(len(job.rows) * (job.queries + job.keys) + job.masked * job.queries * job.keys for job in jobs)
    if 8 * entries > KEPT_BYTES or plan.batch * plan.heads > 1:
        return (chunk for job in jobs for chunk in _chunks(plan, item, head, job, longest, dtype))
    kept = plan.prepared.setdefault("chunks", {})
    if (longest, dtype) not in kept:
        kept[longest, dtype] = [chunk for job in jobs for chunk in _chunks(plan, item, head, job, longest, dtype)]
    return kept[longest, dtype]


def _chunks(plan: BlockPlan, item: int, head: int, job: Job, longest: int, dtype: torch.dtype) -> Iterator[Chunk]:
    bias = blind = None
    if job.masked:
        assert plan.rule is not None  # masked rows have a rule by construction
        mask = plan.rule.mask(plan, int(job.rows[0]), item, head)
        bias = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))[None, None]
        if plan.rule.empty_rows:
            blind = ~mask.any(-1)[None, None]
    for rows in job.rows.split(max(1, longest // job.keys)):
        q_tokens = plan.q_tokens(rows).reshape(-1)
        if job.masked and plan.rule is not None:
            kv_tokens = plan.rule.keys(plan, rows, item, head).reshape(-1)
        else:
            kv_tokens = plan.kv_tokens(rows, item, head).reshape(-1)
        whole = [len(t) == n and _in_order(t) for t, n in ((q_tokens, plan.q_length), (kv_tokens, plan.kv_length))]
        yield Chunk(None if whole[0] else q_tokens, None if whole[1] else kv_tokens, len(rows), bias, blind)


def _in_order(tokens: torch.Tensor) -> bool:
    return bool((tokens == torch.arange(len(tokens))).all())
