"""The problems of the GPU benchmark: the window rule, the lists, and that a new file of cases is found."""

import math
import random

import pytest
import torch

from attn_plugins.pipelines.benching.definitions.window_rule import WindowRule
from attn_plugins.plan.cost import choose_tiles
from attn_plugins.plan.windows import axis_windows
from benchmarks.gpu_cases import all_cases, chosen
from benchmarks.gpu_cases.moa_decoding import StepCase
from benchmarks.gpu_cases.random_lists import BLOCK, ListCase
from benchmarks.gpu_cases.windows import WindowCase
from tests.support.rule import rule_mask


def random_rule(seed):
    dice = random.Random(seed)
    grid = tuple(dice.randint(1, {1: 40, 2: 9, 3: 5}[axes]) for axes in [dice.randint(1, 3)] for _ in range(axes))
    window = tuple(dice.randint(1, size) for size in grid)
    stride = tuple(dice.randint(1, k) for k in window)
    return WindowRule(grid, window, stride, dice.choice([0, 0, 3]))


@pytest.mark.parametrize("seed", range(40))
def test_the_rule_in_arithmetic_is_the_rule_pair_by_pair(seed):
    rule = random_rule(seed)
    ones = (1,) * len(rule.grid)
    expected = rule_mask(rule.grid, rule.window, rule.stride, ones, (False,) * len(rule.grid), (0, 0), (rule.text,) * 2)
    every = torch.arange(rule.length)
    assert torch.equal(rule.seen(every[:, None], every[None]), expected)
    assert rule.share == pytest.approx(expected.double().mean().item())
    rows = torch.tensor([0, rule.length - 1])
    assert torch.equal(rule.mask_rows(torch.tensor([0]), rows), expected[None, rows])


def test_the_published_problems_are_there():
    shapes = {(case.shape, case.option) for case in all_cases()}
    for grid, window, stride in (
        ("256x256 + 512", "80x80", "16x16"),
        ("30x48x80", "18x24x24", "1x1x1"),
        ("30x48x80", "18x24x24", "16x8x8"),
        ("30x48x80", "30x40x40", "1x32x8"),
        ("32768", "2048", "1"),
    ):
        assert (grid, f"window {window} stride {stride}") in shapes
    tokens = {case.tokens for case in all_cases()}
    assert {115200, 32760, 75600, 32768, 66048} <= tokens
    assert {case.share for case in all_cases() if isinstance(case, ListCase)} == {0.05, 0.1, 0.25, 0.5}


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_a_case_is_consistent(case):
    small = case.shrunk()
    assert small.tokens <= 700 and small.name == case.name and type(small) is type(case)
    if isinstance(case, WindowCase):
        assert case.tokens == case.rule.length and small.tokens == small.rule.length
        axes = axis_windows(case.grid, case.window, case.stride)  # legal, or this raises
        assert case.rule.share <= choose_tiles(axes, case.text).pairs / case.tokens**2 + 1e-9 or case.text
        order = small.tile_order((2,) * len(case.grid))
        assert torch.equal(order.sort().values, torch.arange(small.tokens))


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_lists_have_their_density_and_see_themselves(share):
    case = ListCase("lists", 20 * BLOCK, 3, share=share)
    table, plan = case.table(), case.plan()
    assert table.shape == (3, 20, 20) and bool(table.diagonal(dim1=1, dim2=2).all())
    assert plan.density == pytest.approx(share) == table.double().mean().item()
    assert torch.equal(plan.to_mask()[0, :, ::BLOCK, ::BLOCK], table)
    assert share == 1.0 or not torch.equal(table[0], table[1])


def test_choosing_cases():
    cases = all_cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) > 10
    assert chosen(cases, [], False) == cases
    quick = chosen(cases, [], True)
    assert 0 < len(quick) < len(cases) and all(case.quick for case in quick)
    wan = chosen(cases, ["wan", "1d"], True)
    assert [case.name for case in wan] == [name for name in names if name.startswith(("wan", "1d"))]
    assert (
        chosen(cases, ["block_sparse", "vmoba", "agent", "moa", "moa_decode", "mip", "routed_heads", "bam"], False)
        == cases
    )
    assert {case.suite for case in chosen(cases, ["vmoba"], False)} == {"vmoba"}
    with pytest.raises(ValueError, match="no case begins so; there are .*hunyuan"):
        chosen(cases, ["hunyian"], False)


def test_no_case_needs_more_than_a_lease_has():
    """q, k, v, gradients and the check's wide copies of two heads: under 20 GiB. A step has caches, and one query."""
    for case in all_cases():
        if isinstance(case, StepCase):
            assert case.nbytes < 20 << 30
            continue
        elements = 3 * case.batch * case.heads * case.tokens * max(case.head_dims)
        assert 10 * elements * 2 + math.prod((2, 128, case.tokens, 8, 6)) < 20 << 30
