"""VMoBA's cases of the GPU benchmark: the choice that the check goes by, the published problems, the part."""

import math
import random

import pytest
import torch

from attn_plugins.pipelines.benching.definitions.block_choice import BlockChoice
from attn_plugins.pipelines.benching.sides import Setting
from benchmarks.gpu_cases.vmoba import CASES
from benchmarks.gpu_suite.columns import rounded
from benchmarks.gpu_suite.table import markdown
from tests.benchmarks.test_gpu_suite import row
from tests.support.chosen import chosen


def random_choice(seed):
    dice = random.Random(seed)
    grid = tuple(dice.randint(1, {1: 40, 2: 7, 3: 4}[axes]) for axes in [dice.randint(1, 3)] for _ in range(axes))
    block = tuple(dice.randint(1, size) for size in grid)
    tile = dice.choice([None, tuple(dice.randint(1, size) for size in block)])
    return BlockChoice(grid, block, tile, *dice.choice([(dice.randint(1, 5),), (None, dice.random())]))


@pytest.mark.parametrize("seed", range(30))
def test_the_choice_is_the_papers(seed):
    choice = random_choice(seed)
    q, k = torch.randn(2, math.prod(choice.grid), 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = chosen(
        q, k, choice.grid, choice.block, "topk" if choice.k_blocks else "threshold",
        "query" if choice.k_blocks else "head", choice.k_blocks, choice.tau, choice.tile is None, choice.tile, 1, None,
    )  # fmt: skip
    assert torch.equal(choice(q, k)[:, choice.boxes()[0]], expected), choice


def test_the_published_problems_are_there():
    """Grids, blocks and numbers of arXiv 2506.23858, each in both forms."""
    found = {(case.shape, case.option) for case in CASES}
    for shape, option in (
        ("21x30x52", "block 3x30x52 top 2"),
        ("21x30x52", "block 21x5x13 top 6"),
        ("21x30x52", "block 7x5x13 top 18"),
        ("21x45x80", "block 3x45x80 top 2"),
        ("21x45x80", "block 21x9x10 top 10"),
        ("21x45x80", "block 7x15x20 top 9"),
        ("24x36x64", "block 24x6x8 tau 0.25 of a head"),
    ):
        assert {(shape, f"{option} pooled"), (shape, f"{option} exact")} <= found
    assert {case.tokens for case in CASES} == {32_760, 75_600, 55_296} and len(CASES) == 18


@pytest.mark.parametrize("case", [case for case in CASES if "480p" in case.name], ids=lambda case: case.name)
def test_density_is_the_share_of_pairs_in_the_mask(case):
    small = case.shrunk()
    prepared = small.prepare(Setting(torch.float32, 16, torch.device("cpu"), tiny=True))
    mask = prepared.oracle.mask_rows(torch.arange(small.heads), torch.arange(small.tokens))
    assert prepared.work == pytest.approx(mask.double().mean().item())


def test_a_part_stands_in_the_table_beside_the_peers_and_is_none():
    rows = [row("sdpa", "dense", 8.0), row("blocks given", "part", 1.5), row()]
    text = markdown([rounded(one) for one in rows])
    assert "blocks given 1.5" in text and "**Slower than a peer: none**" in text
