"""Plans of every shape that the kernels must take, and what a walk over them says, read back entry by entry."""

from __future__ import annotations

import random

import torch

from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.rules import BitRule
from attn_plugins.plan.tables import PlanTables, Walk


def shuffled(plan: BlockPlan, seed: int) -> BlockPlan:
    """The plan with queries and keys standing in orders of their own (its lists then mean other tokens)."""
    rng = torch.Generator().manual_seed(seed)
    plan.q_order = torch.randperm(plan.q_length, generator=rng)
    plan.kv_order = torch.randperm(plan.kv_length, generator=rng)
    return plan


def random_plan(seed: int, batch: int, heads: int) -> BlockPlan:
    """Ragged blocks in any order, gaps between them, empty lists, masked blocks behind whole ones; half in an order.

    Bits are random, so a block listed as whole is whole by its list, whatever they say.
    """
    dice, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    q_length, kv_length = dice.randint(1, 60), dice.randint(1, 70)
    q_blocks, kv_blocks = _cuts(dice, q_length), _cuts(dice, kv_length)
    shape = dice.choice([(1, 1), (1, heads), (batch, 1), (batch, heads)])
    lists = [
        [
            [dice.sample(range(len(kv_blocks)), dice.randint(0, len(kv_blocks))) for _ in q_blocks]
            for _ in range(shape[1])
        ]
        for _ in range(shape[0])
    ]
    plan = BlockPlan.from_lists(q_blocks, kv_blocks, lists, q_length=q_length, kv_length=kv_length)
    if dice.random() < 0.7:
        share = torch.rand(plan.count.shape, generator=rng)
        plan.full = (plan.count * share).to(torch.int32)
        bits_shape = dice.choice([(1, 1), shape])
        plan.rule = BitRule(torch.rand(*bits_shape, q_length, kv_length, generator=rng) < 0.5)
    return shuffled(plan, seed) if dice.random() < 0.5 else plan


def mask_of(plan: BlockPlan) -> torch.Tensor:
    """(B or 1, H or 1, N, N_kv) bool, list by list: like `to_mask`, for a rule whose whole blocks have holes in it."""
    mask = torch.zeros(plan.batch, plan.heads, plan.q_length, plan.kv_length, dtype=torch.bool)
    for b, h, row, slot in torch.nonzero(plan.lists >= 0).tolist():
        j = int(plan.lists[b, h, row, slot])
        q = _tokens(plan.q_order, int(plan.q_start[row]), int(plan.q_size[row]))
        kv = _tokens(plan.kv_order, int(plan.kv_start[j]), int(plan.kv_size[j]))
        seen = torch.ones(len(q), len(kv), dtype=torch.bool)
        if slot >= int(plan.full[b, h, row]):
            assert isinstance(plan.rule, BitRule)
            bits = plan.rule.bits
            seen = bits[b % bits.shape[0], h % bits.shape[1]][q[:, None], kv]
        mask[b, h, q[:, None], kv] = seen
    return mask


def visits(walk: Walk, tables: PlanTables, q_step: int, kv_step: int, keys_own: bool) -> list[tuple[int, ...]]:
    """(item, head, query token, key token, masked) of all visits, sorted, as a kernel would make them."""
    own_order, order = (tables.kv_order, tables.q_order) if keys_own else (tables.q_order, tables.kv_order)
    step = q_step if keys_own else kv_step
    pattern = torch.arange(step) if walk.pattern is None else walk.pattern
    found = []
    for b in range(walk.work.shape[0]):
        for h in range(walk.work.shape[1]):
            for start, size, first, even, masked, whole, last, _ in walk.work[b, h].tolist():
                own = _tokens(own_order, start, size).tolist()
                for i in range(first, last):
                    lead, place = walk.entries[b, h, i].tolist()
                    there = (lead + pattern).tolist() if i < masked else _tokens(order, place, lead).tolist()
                    assert there == _tokens(order, place, len(there)).tolist()  # masks go by place
                    ruled = even <= i < masked or i >= whole
                    pairs = [(b, h, m, n, ruled) for m in own for n in there]
                    found += [(b, h, n, m, ruled) for b, h, m, n, ruled in pairs] if keys_own else pairs
    return sorted(found)


def listed(plan: BlockPlan) -> list[tuple[int, ...]]:
    """What `visits` should find, from the plan itself."""
    found = []
    for b, h, row, slot in torch.nonzero(plan.lists >= 0).tolist():
        j = int(plan.lists[b, h, row, slot])
        q = _tokens(plan.q_order, int(plan.q_start[row]), int(plan.q_size[row])).tolist()
        kv = _tokens(plan.kv_order, int(plan.kv_start[j]), int(plan.kv_size[j])).tolist()
        found += [(b, h, m, n, slot >= int(plan.full[b, h, row])) for m in q for n in kv]
    return sorted(found)


def _cuts(dice: random.Random, length: int) -> list[tuple[int, int]]:
    blocks, at = [], 0
    most = dice.choice([5, 16, 40])
    while at < length:
        size = min(dice.choice([dice.randint(1, most), most]), length - at)
        blocks.append((at, size))
        at += size + dice.choice([0, 0, 0, 2])
    return dice.sample(blocks, len(blocks))


def _tokens(order: torch.Tensor | None, start: int, size: int) -> torch.Tensor:
    places = torch.arange(start, start + size)
    return places if order is None else order[places].long()
