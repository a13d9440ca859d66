"""Flex attention's side: blocks made in pieces, in any order, are those of the mask."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from attn_plugins.pipelines.benching.backends import flex
from attn_plugins.pipelines.benching.backends.dense import dense_sides
from attn_plugins.pipelines.benching.definitions.window_rule import WindowRule
from attn_plugins.pipelines.benching.sides import Setting
from benchmarks.gpu_cases import all_cases

RULES = [
    WindowRule((300,), (40,), (7,)),
    WindowRule((20, 21), (9, 8), (4, 3), 13),
    WindowRule((256,), (64,), (64,)),
    WindowRule((6, 7, 9), (3, 7, 4), (1, 1, 2)),
]


def blocks_of(mask):
    """(Q, K) bool by definition: some pair of a block, every pair of it."""
    rows = [mask[i : i + flex.BLOCK] for i in range(0, len(mask), flex.BLOCK)]
    tiles = [[row[:, j : j + flex.BLOCK] for j in range(0, len(mask), flex.BLOCK)] for row in rows]
    return tuple(torch.tensor([[bool(f(tile)) for tile in row] for row in tiles]) for f in (torch.any, torch.all))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shuffled", [False, True])
def test_block_tables(rule, shuffled):
    order = torch.randperm(rule.length) if shuffled else torch.arange(rule.length)
    mask = rule.seen(order[:, None], order[None])
    visited, whole = flex.block_tables(rule.seen, order, pieces=2)
    some, every = blocks_of(mask)
    assert torch.equal(visited[0], some) and torch.equal(whole[0], every)
    sizes = torch.tensor([min(flex.BLOCK, rule.length - i) for i in range(0, rule.length, flex.BLOCK)])
    expected = (some * sizes[:, None] * sizes).sum().item() / rule.length**2
    assert flex.table_density(visited, rule.length) == pytest.approx(expected)


def test_the_block_mask_is_the_mask():
    rule = RULES[1]
    order = torch.randperm(rule.length)
    blocks = flex.block_tables(rule.seen, order)
    mask = flex.block_mask(*blocks, lambda b, h, i, j: rule.seen(order[i], order[j]), rule.length)
    expected = rule.seen(order[:, None], order[None])
    assert torch.equal(create_mask(mask.mask_mod, 1, 1, rule.length, rule.length)[0, 0], expected)
    partial, full = (
        torch.zeros(4, 4, dtype=torch.bool).scatter_(1, indices[0, 0].long(), torch.arange(4) < counts[0, 0, :, None])
        for counts, indices in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
    )
    assert torch.equal(partial | full, blocks[0][0]) and torch.equal(full, blocks[1][0])


@pytest.mark.parametrize("case", [case.shrunk() for case in all_cases()], ids=lambda case: case.name)
def test_every_side_is_right_where_it_runs(case):
    """Forward on a CPU: ours, a part of it, and the peers: flex attention in the order that it is given, for one."""
    prepared = case.prepare(Setting(torch.float32, 16, torch.device("cpu"), tiny=True))
    sides = [side for side in prepared.sides if side.role != "dense" and side.name != "natten"]
    alone = case.suite in ("routed_heads", "bam")  # of which no one else has a kernel
    assert len(sides) >= 2 - alone and sides[-1].name == "ours"
    for side in sides:
        built = side.build()
        verdict = prepared.oracle.judge(built.run, gradients=False)
        assert verdict.right, (side.name, verdict.errors)
        assert prepared.work <= built.density + 1e-9


def test_flex_attention_in_tile_order():
    case = next(case for case in all_cases() if case.name == "hunyuan-18x24x24-s1").shrunk()
    object.__setattr__(case, "flex_order", case.tile_order((2, 4, 2)))
    prepared = case.prepare(Setting(torch.float32, 16, torch.device("cpu"), tiny=True))
    built = next(side for side in prepared.sides if side.name == "flex").build()
    assert prepared.oracle.judge(built.run, gradients=False).right


def test_the_dense_kernels_are_forced_one_by_one():
    names = [side.name for side in dense_sides(torch.device("cuda"))]
    assert {"cudnn", "sdpa_flash", "sdpa_efficient"} < set(names)
    assert [side.name for side in dense_sides(torch.device("cpu"))] == ["sdpa"]
    forced = dense_sides(torch.device("cuda"))[0].build().run
    with pytest.raises(RuntimeError):  # no cuDNN on a CPU: it does not silently run another kernel
        forced(*torch.randn(3, 1, 1, 8, 8))
