"""A block plan as a list of jobs for the CPU backend: query blocks that can stand side by side in one attention call.

Blocks go together that have the same number of queries and of keys and the same mask. A job is cut into chunks small
enough for the caches; what a chunk gathers is worked out when it runs and shared by all heads.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

import torch

from attn_plugins.ops.block_sparse.tokens import Tokens
from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.cost import KEPT_BYTES, WHOLE_KEYS


@dataclass(frozen=True)
class Job:
    """Query blocks `rows` (R,) of `queries` rows each that see `keys` keys each; `masked` ones share one mask."""

    rows: torch.Tensor
    queries: int
    keys: int
    masked: bool


@dataclass(frozen=True)
class Part:
    """Some of a chunk's keys, and their mask as a bias: one attention call."""

    keys: Tokens
    bias: torch.Tensor | None = None  # (1, 1, T, E)
    blind: torch.Tensor | None = None  # (1, 1, T) bool, queries that see none of these keys, if there are any

    def to(self, device: torch.device) -> Part:
        bias, blind = (None if t is None else t.to(device) for t in (self.bias, self.blind))
        return Part(self.keys.to(device), bias, blind)


@dataclass(frozen=True)
class Chunk:
    """A few query blocks of a job, and the keys they see: in one part, or in two whose results are merged by LSE.

    So many KV `heads` go in one call.
    """

    q: Tokens
    parts: tuple[Part, ...]
    heads: int

    def to(self, device: torch.device) -> Chunk:
        if device.type == "cpu":
            return self
        return Chunk(self.q.to(device), tuple(part.to(device) for part in self.parts), self.heads)


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


def plan_chunks(
    plan: BlockPlan, item: int, head: int, longest: int, kv_heads: int, dtype: torch.dtype
) -> Iterable[Chunk]:
    """All chunks of one (batch item, head) of the plan's lists; kept with the plan where they are small.

    A chunk gathers at most `longest` keys, over its share of the `kv_heads`; but at least one query block of one head.
    """
    made = (
        chunk
        for job in plan_jobs(plan, item, head)
        for chunk in _chunks(plan, item, head, job, longest, kv_heads, dtype)
    )
    if plan.batch * plan.heads > 1:
        return made
    kept = plan.prepared.setdefault("chunks", {})
    return kept.get((longest, kv_heads, dtype)) or _keeping(made, kept, (longest, kv_heads, dtype))


def _keeping(made: Iterable[Chunk], kept: dict[Hashable, list[Chunk]], key: Hashable) -> Iterator[Chunk]:
    """Hand chunks on as they are made, and keep them all if they turn out to be small."""
    chunks: list[Chunk] | None = []
    size = 0
    shared: set[int] = set()
    for chunk in made:
        if chunks is not None:
            tensors = [chunk.q.index, *(t for part in chunk.parts for t in (part.keys.index, part.bias, part.blind))]
            fresh = [t for t in tensors if t is not None and id(t) not in shared]
            shared |= {id(t) for t in fresh}
            size += sum(t.numel() * t.element_size() for t in fresh)
            chunks.append(chunk)
            if size > KEPT_BYTES:
                chunks = None
        yield chunk
    if chunks is not None:
        kept[key] = chunks


def _chunks(
    plan: BlockPlan, item: int, head: int, job: Job, longest: int, kv_heads: int, dtype: torch.dtype
) -> Iterator[Chunk]:
    columns: list[torch.Tensor] = []
    masks: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    if job.masked:
        assert plan.rule is not None  # masked rows have a rule by construction
        mask = plan.rule.mask(plan, int(job.rows[0]), item, head)
        columns = _split(mask)
        masks = [_bias(mask[:, chosen], dtype) for chosen in columns[-1:]]
    # Query blocks of one head first: they often share keys. More heads where that leaves room.
    heads = min(max(1, longest // (job.keys * len(job.rows))), kv_heads)
    for rows in job.rows.split(max(1, longest // (job.keys * heads))):
        q = Tokens.of(plan.q_tokens(rows))
        if not job.masked or plan.rule is None:
            yield Chunk(q, (Part(Tokens.of(plan.kv_tokens(rows, item, head))),), heads)
            continue
        keys = plan.rule.keys(plan, rows, item, head)
        whole = [Part(Tokens.of(keys[:, chosen])) for chosen in columns[:-1]]
        yield Chunk(q, (*whole, *(Part(Tokens.of(keys[:, columns[-1]]), *one) for one in masks)), heads)


def _split(mask: torch.Tensor) -> list[torch.Tensor]:
    """The columns of a tile's mask: those that all queries see, if they are many, and the rest."""
    whole = mask.all(0)
    if int(whole.sum()) < WHOLE_KEYS or bool(whole.all()):
        return [torch.arange(mask.shape[1])]
    return [torch.nonzero(whole)[:, 0], torch.nonzero(~whole)[:, 0]]


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    blind = ~mask.any(-1)
    bias = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
    return bias[None, None], blind[None, None] if bool(blind.any()) else None
