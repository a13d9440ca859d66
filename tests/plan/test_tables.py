"""The tables that kernels walk over say what the plan says, however they were made."""

import dataclasses

import pytest
import torch

from attn_plugins.plan import pieces, tables
from attn_plugins.plan.block_plan import BlockPlan
from attn_plugins.plan.rules import BitRule
from attn_plugins.plan.tables import PlanTables, device_tables, rule_refusal
from attn_plugins.sequence import Sequence
from tests.support.walks import listed, random_plan, visits

CPU = torch.device("cpu")


class OnDevice(PlanTables):
    """Tables that may not look at what the plan's tensors hold."""

    known = False


@pytest.fixture
def blind(monkeypatch):
    """The way of plans that live on a device, run on CPU tensors; sizes of blocks unknown too."""

    def unknown(start, size, order, step):
        return pieces._cut_unknown(start, size, order, int((start + size).max()), step, CPU)

    def use(plan):
        monkeypatch.setattr(pieces, "_cut_known", unknown)
        made = device_tables(plan, CPU)
        fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
        return OnDevice(**fields)

    return use


@pytest.mark.parametrize("steps", [(16, 16), (8, 16), (32, 4)], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_walks_make_the_visits_that_are_listed(seed, steps):
    plan = random_plan(seed, 2, 3)
    made, expected = device_tables(plan, CPU), listed(plan)
    assert visits(made.over_queries(*steps), made, *steps, keys_own=False) == expected
    assert visits(made.over_keys(*steps), made, *steps, keys_own=True) == expected


@pytest.mark.parametrize("steps", [(16, 16), (8, 16), (32, 4)], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_walks_made_without_a_look_at_the_plan(seed, steps, blind):
    plan = random_plan(seed, 2, 3)
    made, expected = blind(plan), listed(plan)
    assert visits(made.over_queries(*steps), made, *steps, keys_own=False) == expected
    assert visits(made.over_keys(*steps), made, *steps, keys_own=True) == expected


def test_nothing_is_read_back_of_a_plan_on_a_device():
    """Tensors on "meta" have no values: whoever asks for one gets an error."""
    plan = random_plan(1, 2, 3)
    lists = {name: getattr(plan, name).to("meta") for name in ("lists", "full", "count")}
    blocks = {name: getattr(plan, name).to("meta") for name in ("q_start", "q_size", "kv_start", "kv_size")}
    bits = BitRule(torch.ones(1, 1, plan.q_length, plan.kv_length, dtype=torch.bool, device="meta"))
    for moved in (lists, {**lists, **blocks}):
        there = dataclasses.replace(plan, **moved, rule=bits, prepared={})
        made = device_tables(there, torch.device("meta"))
        assert {made.over_queries(16, 16).work.device.type, made.over_keys(16, 16).work.device.type} == {"meta"}


def test_rows_of_most_work_come_first():
    plan = BlockPlan.from_lists(
        [(i, 1) for i in range(6)], [(j, 1) for j in range(6)], [[0], [1, 2], [], [3], [0, 4, 5], [1, 5]]
    )
    work = device_tables(plan, CPU).over_queries(16, 16).work[0, 0]
    assert work[:, 0].tolist() == [4, 1, 5, 0, 3, 2]  # ties by place


def test_rows_much_longer_than_others_are_counted():
    plan = BlockPlan.from_windows(Sequence((32, 32), 0, 40), 3, q_tile=(4, 4), kv_tile=(4, 4))
    assert device_tables(plan, CPU).over_queries(16, 16).lead == 3  # 40 text rows
    assert device_tables(plan, CPU).over_keys(16, 16).lead == 3


def test_blocks_that_overlap_are_cut_at_each_others_edges():
    start, size = torch.tensor([0, 4, 30]), torch.tensor([10, 10, 5])
    made = pieces.cut(start, size, None, 40, 8, CPU)
    assert list(zip(made.start.tolist(), made.size.tolist(), strict=True)) == [(0, 4), (4, 6), (10, 4), (30, 5)]
    assert made.base.tolist() == [0, 1, 3] and made.number.tolist() == [2, 2, 1]


def test_a_piece_laid_out_like_most_needs_no_order():
    plan = BlockPlan.from_windows(Sequence((4, 8), 0, 10), 3, q_tile=(2, 4), kv_tile=(2, 4))
    made = device_tables(plan, CPU).kv_pieces(8)
    assert made.pattern.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert made.even.tolist() == [True] * 4 + [False] * 2  # text stands in a row


def test_pieces_are_made_once_for_plans_over_the_same_blocks():
    plan = random_plan(3, 1, 1)
    other = dataclasses.replace(plan, lists=plan.lists.clone(), prepared={})
    assert device_tables(plan, CPU).q_pieces(16) is device_tables(other, CPU).q_pieces(16)
    assert device_tables(plan, CPU) is device_tables(plan, CPU)


def test_a_rule_that_kernels_do_not_know():
    plan = random_plan(2, 1, 1)
    plan.rule = object()
    assert "a plan with a object" in rule_refusal(plan)
    with pytest.raises(ValueError, match="row intervals and bit masks"):
        tables.device_tables(plan, CPU)
