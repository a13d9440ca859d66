"""torch.compile with its real backend: one graph, the same numbers, and no new graph or kernel for a new resolution."""

from __future__ import annotations

import torch

from attn_plugins.ops import block_sparse_attention, neighborhood_attention
from tests.gpu.place import counted_compiles


def attend(q, k, v, height, width, backend):
    scaled = q * 1.5  # something for the compiler to fuse around the operator
    return neighborhood_attention(scaled, k, v, grid=(height, width), window=(5, 6), stride=(1, 2), backend=backend) + v


def test_one_graph_forward_and_backward(place):
    height, width = (6, 7) if place.tiny else (48, 56)
    leaves = place.qkv(height * width, 64, torch.bfloat16, grad=True)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager" if place.tiny else "inductor")

    def plain(q, k, v):  # the allowance is our own uncompiled error: fusing rounds elsewhere, equal bits are too much
        return attend(q, k, v, height, width, "cpu" if q.dtype == torch.float64 else place.backend)

    place.check(lambda *t: compiled(*t, height, width, place.backend), plain, leaves)


def test_new_resolutions_need_no_new_graph(place):
    """After the compiler has seen two sizes it takes any."""
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(attend, fullgraph=True, backend=count)
    sizes = [(6, 7), (7, 8), (9, 6)] if place.tiny else [(48, 56), (50, 60), (64, 64), (40, 72), (33, 47)]
    settled = None
    for number, (height, width) in enumerate(sizes):
        q, k, v = place.qkv(height * width, 64, torch.bfloat16)
        found = compiled(q, k, v, height, width, place.backend)
        assert torch.equal(found, attend(q, k, v, height, width, place.backend))
        settled = graphs if number == 1 else settled
    assert graphs == settled and graphs <= 3


def test_new_resolutions_need_no_new_kernel(place, on_gpu):
    """Sizes of one bucket: tile-sized blocks, lists of other lengths. Forward and backward."""

    def run(height, width):
        q, k, v = place.qkv(height * width, 64, torch.bfloat16, grad=True)
        options = {"grid": (height, width), "window": (32, 32), "stride": (16, 16), "backend": "triton"}
        place.grads(neighborhood_attention(q, k, v, **options), (q, k, v))

    run(64, 64)
    run(80, 96)
    with counted_compiles() as compiled:
        for height, width in ((96, 96), (112, 64), (128, 144), (96, 160)):
            run(height, width)
    assert not compiled


def test_plans_that_come_and_go_share_a_graph(place):
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph

    def attend_plan(q, k, v, plan):
        return block_sparse_attention(q, k, v, plan, backend=place.backend)

    compiled = torch.compile(attend_plan, fullgraph=True, backend=count)
    blocks = 5 if place.tiny else 64
    for seed in range(4):
        plan = place.lists_plan(blocks, 0.3, seed=seed)
        q, k, v = place.qkv(plan.q_length, 64, torch.bfloat16)
        assert torch.equal(compiled(q, k, v, plan), attend_plan(q, k, v, plan))
    assert graphs <= 2
