"""Plans from lists and from masks: what they allow, how much it is, and what they refuse."""

import random

import pytest
import torch

from attn_plugins.plan.block_plan import BlockPlan


def random_mask(seed):
    """A bool mask of some shape, with empty, full and ragged blocks in it."""
    dice = random.Random(seed)
    rng = torch.Generator().manual_seed(seed)
    shape = [dice.choice([1, 2]), dice.choice([1, 3]), dice.randint(1, 23), dice.randint(1, 29)]
    mask = torch.rand(shape, generator=rng) < dice.choice([0.05, 0.5, 1.1])
    mask[..., : dice.randint(0, shape[2]), : dice.randint(0, shape[3])] = True
    mask[..., dice.randint(0, shape[2]) :, :] &= dice.random() < 0.5
    return mask, dice.randint(1, 8), dice.randint(1, 8)


@pytest.mark.parametrize("seed", range(40))
def test_from_mask_allows_the_mask(seed):
    mask, q_block, kv_block = random_mask(seed)
    plan = BlockPlan.from_mask(mask, q_block, kv_block)
    assert torch.equal(plan.to_mask(), mask)
    assert plan.is_dense == bool(mask.all())


@pytest.mark.parametrize("seed", range(40))
def test_lists_have_full_blocks_first_each_once_and_visited_is_their_area(seed):
    mask, q_block, kv_block = random_mask(seed)
    plan = BlockPlan.from_mask(mask, q_block, kv_block)
    area = 0
    for b, item in enumerate(mask):
        for h, head in enumerate(item):
            for q, rows in enumerate(head.split(q_block)):
                blocks = rows.split(kv_block, dim=1)
                full = [n for n, block in enumerate(blocks) if block.all()]
                partial = [n for n, block in enumerate(blocks) if block.any() and not block.all()]
                count = int(plan.count[b, h, q])
                assert plan.lists[b, h, q, :count].tolist() == full + partial
                assert (plan.lists[b, h, q, count:] == -1).all() and plan.full[b, h, q] == len(full)
                area += sum(blocks[n].numel() for n in full + partial)
    lists = mask.shape[0] * mask.shape[1]
    assert plan.visited == pytest.approx(area / lists)
    assert plan.density == pytest.approx(area / mask.numel())
    assert plan.flops(3, 5, 64) == pytest.approx(4 * 64 * 15 * area / lists)


@pytest.mark.parametrize("seed", range(40))
def test_inverted_lists_and_row_order(seed):
    plan = BlockPlan.from_mask(*random_mask(seed))
    inverted, counts = plan.inverted()
    for b in range(plan.batch):
        for h in range(plan.heads):
            rows = [[n for n in row if n >= 0] for row in plan.lists[b, h].tolist()]
            for n in range(len(plan.kv_start)):
                visitors = [q for q, row in enumerate(rows) if n in row]
                assert inverted[b, h, n, : counts[b, h, n]].tolist() == visitors
                assert (inverted[b, h, n, counts[b, h, n] :] == -1).all()
            assert plan.row_order[b, h].tolist() == sorted(range(len(rows)), key=lambda q: (-len(rows[q]), q))


def test_from_lists_shared_per_head_and_per_item():
    q_blocks, kv_blocks = [(0, 2), (3, 1)], [(0, 3), (3, 2), (6, 1)]
    shared = BlockPlan.from_lists(q_blocks, kv_blocks, [[2, 0], []], q_length=5, kv_length=8)
    expected = torch.zeros(5, 8, dtype=torch.bool)
    expected[:2, [0, 1, 2, 6]] = True
    assert torch.equal(shared.to_mask(), expected[None, None])
    assert (shared.visited, shared.density) == (8.0, 0.2)
    heads = BlockPlan.from_lists(q_blocks, kv_blocks, [[[2, 0], []], [[], [1]]])
    assert heads.lists.shape[:3] == (1, 2, 2) and heads.to_mask().sum((-1, -2)).tolist() == [[8, 2]]
    items = BlockPlan.from_lists(q_blocks, kv_blocks, [[[[], []]], [[[0], [0, 1, 2]]], [[[1], []]]])
    assert items.lists.shape[:3] == (3, 1, 2) and items.to_mask().sum((-1, -2)).tolist() == [[0], [12], [4]]


def test_a_plan_of_every_pair_is_dense_and_no_other_is():
    whole = BlockPlan.from_lists([(0, 3), (3, 2)], [(0, 4), (4, 4)], [[0, 1], [1, 0]])
    assert whole.is_dense and whole.density == 1
    assert not BlockPlan.from_lists([(0, 3), (3, 2)], [(0, 4), (4, 4)], [[0, 1], [1]]).is_dense
    assert not BlockPlan.from_lists([(0, 3)], [(0, 8)], [[0]], q_length=5).is_dense
    assert not BlockPlan.from_lists([(0, 3), (3, 2)], [(0, 4)], [[0], [0]], kv_length=8).is_dense


def test_a_plan_in_which_no_one_sees_anything():
    plan = BlockPlan.from_lists([(0, 4)], [(0, 6)], [[]])
    assert not plan.to_mask().any() and plan.density == 0
    assert not BlockPlan.from_mask(torch.zeros(4, 6, dtype=torch.bool), 2, 2).to_mask().any()


@pytest.mark.parametrize(
    ("q_blocks", "kv_blocks", "lists", "named"),
    [
        ([], [(0, 2)], [], "0 query and 1 KV blocks"),
        ([(0, 2)], [], [[]], "1 query and 0 KV blocks"),
        ([(0, 2), (1, 2)], [(0, 2)], [[0], [0]], "query blocks overlap"),
        ([(0, 2)], [(0, 2)], [[1]], r"query block 0 lists \[1\]"),
        ([(0, 2)], [(0, 2)], [[-1]], r"query block 0 lists \[-1\]"),
        ([(0, 2)], [(0, 2)], [[0, 0]], r"\[0, 0\]"),
        ([(0, 2)], [(0, 2)], torch.tensor([[0, 0]]), r"\[0, 0\]"),
        ([(0, 2)], [(0, 2)], [[0], [0]], "each of the 1 query blocks"),
        ([(0, 2)], [(0, 2)], [[[0]], [[0], [0]]], "each of the 1 query blocks"),
        ([(0, 0)], [(0, 2)], [[0]], r"query block \(0, 0\)"),
        ([(0, 2)], [(-1, 2)], [[0]], r"KV block \(-1, 2\)"),
        ([(0, 9)], [(0, 2)], [[0]], r"query block \(0, 9\)"),
        ([(0, 2)], [(0, 2), (1, 2)], [[0, 1]], "overlap"),  # a key would count twice in the softmax
    ],
)
def test_what_is_no_plan_is_refused(q_blocks, kv_blocks, lists, named):
    with pytest.raises(ValueError, match=named):
        BlockPlan.from_lists(q_blocks, kv_blocks, lists, q_length=4, kv_length=4)


def test_kv_blocks_may_overlap_where_no_list_holds_both():
    plan = BlockPlan.from_lists([(0, 2), (2, 2)], [(0, 3), (1, 3)], [[0], [1]])
    assert plan.to_mask()[0, 0].int().tolist() == [[1, 1, 1, 0]] * 2 + [[0, 1, 1, 1]] * 2


def test_a_freed_plan_is_named():
    key = BlockPlan.from_lists([(0, 1)], [(0, 1)], [[0]]).key
    with pytest.raises(RuntimeError, match=f"block plan {key} no longer exists"):
        BlockPlan.by_key(key)
