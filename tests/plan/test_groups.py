"""Plans of groups: their mask is the table of who sees whom, whatever the order of the tokens."""

from __future__ import annotations

import pytest
import torch

from attn_plugins.ops import block_sparse_attention
from attn_plugins.plan.groups import grouped_plan
from tests.support.live_bytes import LiveBytes
from tests.support.tolerance import sdpa, within


def labels(tokens: int, groups: int, seed: int) -> torch.Tensor:
    """Groups from -1 on, the last of which has no token."""
    return torch.randint(-1, groups - 1, (tokens,), generator=torch.Generator().manual_seed(seed))


def by_pairs(q_group: torch.Tensor, kv_group: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(len(q_group), len(kv_group), dtype=torch.bool)
    for i, mine in enumerate(q_group.tolist()):
        for j, other in enumerate(kv_group.tolist()):
            mask[i, j] = mine >= 0 and other >= 0 and bool(sees[mine, other])
    return mask


@pytest.mark.parametrize("seed", range(6))
def test_the_mask_is_the_table(seed: int) -> None:
    q_group, kv_group = labels(23, 4, seed), labels(17, 5, seed + 100)
    sees = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed)) < 0.5
    plan = grouped_plan(q_group, kv_group, sees)
    assert torch.equal(plan.to_mask()[0, 0], by_pairs(q_group, kv_group, sees))
    assert plan.rule is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_over_it_and_its_gradient(dtype: torch.dtype) -> None:
    group = labels(40, 4, 3)
    sees = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    plan = grouped_plan(group, group, sees)
    mask = by_pairs(group, group, sees)
    assert not mask.any(1).all() and mask.any()  # some rows see nothing: group 2, and those in no group
    made = [torch.randn(2, 3, 40, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in range(4)]
    q, k, v, weight = (t.to(dtype) for t in made)
    leaves = [
        [t.clone().to(as_dtype).requires_grad_() for t in (q, k, v)] for as_dtype in (dtype, dtype, torch.float64)
    ]
    ours = block_sparse_attention(*leaves[0], plan)
    theirs, exact = (sdpa(*some, mask, None) for some in leaves[1:])
    assert within(ours, theirs, exact)
    assert not ours[:, :, ~mask.any(1)].any()
    for out in (ours, theirs, exact):
        (out * weight.to(out.dtype)).sum().backward()
    for ours_leaf, theirs_leaf, exact_leaf in zip(*leaves, strict=True):
        assert within(ours_leaf.grad, theirs_leaf.grad, exact_leaf.grad)


@pytest.mark.parametrize(
    ("q_group", "kv_group", "sees"),
    [([-1, -1], [0, 0], [[True]]), ([0, 0], [-1, -1], [[True]]), ([0, 0], [0, 0], [[False]])],
)
def test_where_nobody_sees_anything_all_is_0(q_group: list[int], kv_group: list[int], sees: list[list[bool]]) -> None:
    plan = grouped_plan(torch.tensor(q_group), torch.tensor(kv_group), torch.tensor(sees))
    assert not plan.to_mask().any()
    out = block_sparse_attention(*(torch.full((1, 1, 2, 4), 6e4, dtype=torch.float16) for _ in range(3)), plan)
    assert torch.equal(out, torch.zeros_like(out))


def test_a_run_in_raster_order_needs_no_order() -> None:
    plan = grouped_plan(torch.tensor([0, 0, 1]), torch.tensor([1, 0, 1]), torch.ones(2, 2, dtype=torch.bool))
    assert plan.q_order is None and torch.equal(plan.kv_order, torch.tensor([1, 0, 2]))  # stable
    assert plan.is_dense


def test_a_group_that_the_table_lacks() -> None:
    with pytest.raises(ValueError, match=r"kv_group has groups 0..3, sees is for 0..1"):
        grouped_plan(torch.tensor([0]), torch.tensor([0, 3]), torch.ones(2, 2, dtype=torch.bool))


def test_making_one_takes_no_memory_of_tokens_squared() -> None:
    tokens = 1 << 17
    group = torch.arange(tokens) % 3
    with LiveBytes() as live:
        plan = grouped_plan(group, group, torch.eye(3, dtype=torch.bool))
    assert plan.density == pytest.approx(1 / 3, rel=1e-4)
    assert live.peak < 16 * 8 * tokens
