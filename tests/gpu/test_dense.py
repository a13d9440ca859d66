"""A plan without a hole runs PyTorch's own dense attention: never slower than not having a plan at all."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attn_plugins.ops import block_sparse_attention, neighborhood_attention
from attn_plugins.plan.block_plan import BlockPlan
from tests.gpu.place import counted_launches


def test_a_whole_window_is_dense_attention(place):
    grid = (4, 6, 6) if place.tiny else (8, 32, 32)
    tokens = torch.Size(grid).numel()
    leaves = place.qkv(tokens, 128, torch.bfloat16, grad=True)
    place.check(
        lambda *t: neighborhood_attention(*t, grid=grid, window=-1, backend=place.backend),
        F.scaled_dot_product_attention,
        leaves,
    )


def test_no_sparse_kernel_is_launched_for_it(place, on_gpu):
    plan = BlockPlan.from_lists([(0, 4096)], [(0, 2048), (2048, 2048)], [[0, 1]])
    holes = BlockPlan.from_lists([(0, 4096)], [(0, 2048), (2048, 2048)], [[0]])
    q, k, v = place.qkv(4096, 128, torch.bfloat16)
    with counted_launches() as launched:
        block_sparse_attention(q, k, v, plan, backend="triton")
    assert not launched
    with counted_launches() as launched:  # the counter counts
        block_sparse_attention(q, k, v, holes, backend="triton")
    assert launched
